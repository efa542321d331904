"""The model compiled by torch.compile: how often, and that it changes nothing but rounding."""

import copy
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from ds_roberta.config import ModelConfig
from ds_roberta.data.layout import FlatLayout
from ds_roberta.data.loader import MicroBatch
from ds_roberta.model import encoder, kernels
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.training.compilation import compile_layers, compile_model, compiled_graphs

pytestmark = [
    # torch.compile looks at `.grad` of all inputs, and its own filter of this warning does not stand up to "error".
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0"),
]
CASES = [*((32, padded, training) for padded in (False, True) for training in (True, False)), (48, False, True)]
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8), torch._inductor.config.patch(deterministic=False):
        yield
    torch._dynamo.reset()


@pytest.fixture
def gpu_kernels(monkeypatch):
    """The operations that a GPU is given, on the CPU."""
    monkeypatch.setattr(encoder, "attention", lambda *arguments: F.scaled_dot_product_attention(*arguments))
    monkeypatch.setattr(kernels.Dropout, "forward", lambda self, values: F.dropout(values, self.p, self.training))


def make_models(backend, dropout_prob, dtype, whole=False):
    """The same model twice, plain and with compiled layers or `whole`, whose gradients are summed in fp32."""
    config = ModelConfig(100, 2, 32, 2, 66, hidden_dropout_prob=dropout_prob, attention_probs_dropout_prob=dropout_prob)
    torch.manual_seed(0)
    plain = MaskedLM(config).to(dtype)
    compiled = copy.deepcopy(plain)
    for parameter in (*plain.parameters(), *compiled.parameters()):
        parameter.grad_dtype = torch.float32
    names = list(compiled.state_dict())
    if whole:
        compile_model(compiled, backend)
    else:
        compile_layers(compiled.roberta.encoder, backend)
    assert list(compiled.state_dict()) == names
    return plain, compiled


def take(model, length, padded, training, masked, seed=5):
    """A micro-step, whose gradient is added to those before, or an evaluation; the loss."""
    torch.manual_seed(seed)
    input_ids = torch.randint(4, 99, (4, length))
    mask = torch.ones(4, length, dtype=torch.bool) if padded else None
    if padded:
        mask[1, length // 2 :] = False
    model.train(training)
    with torch.set_grad_enabled(training):
        loss = model(MicroBatch(input_ids, mask, torch.arange(masked), torch.randint(4, 99, (masked,)), 0, 0))["loss"]
    if training:
        (loss / max(masked, 1)).backward()
    return loss.detach()


def assert_same_gradients(compiled, plain, tolerance):
    largest = max(parameter.grad.abs().max().item() for parameter in plain.parameters())
    for mine, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(("name", "dtype"), [("aot_eager", torch.float32), ("eager", torch.bfloat16)])
def test_all_layers_share_a_graph_for_each_shape_and_none_is_made_again(gpu_kernels, name, dtype):
    backend = CompileCounterWithBackend(name)
    plain, compiled = make_models(backend, 0.0, dtype)
    for rounds in range(2):
        for number, case in enumerate(CASES):
            for masked in (5, 9, 0):
                torch.testing.assert_close(take(compiled, *case, masked), take(plain, *case, masked))
            assert backend.frame_count == (len(CASES) if rounds else number + 1), case
    assert not counters["graph_break"]
    assert_same_gradients(compiled, plain, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("name", "dtype"), [("aot_eager", torch.float32), ("eager", torch.bfloat16)])
def test_the_rest_of_the_model_has_a_few_graphs_whatever_the_number_of_masked_tokens(gpu_kernels, name, dtype):
    backend = CompileCounterWithBackend(name)
    plain, compiled = make_models(backend, 0.0, dtype, whole=True)
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    graphs = []
    for masked in (21, 24, 22, 27, 25, 0):
        torch.testing.assert_close(
            take(compiled, 32, False, True, masked), take(plain, 32, False, True, masked), rtol=rounding, atol=0
        )
        graphs.append(backend.frame_count)
    # 128 tokens: rows in fours. The layers, the embeddings, the head before and after its large matrix.
    assert graphs == [4, 4, 4, 6, 6, 8]
    assert not counters["graph_break"]
    assert_same_gradients(compiled, plain, rounding)


def test_layers_without_padding_share_a_graph_whatever_the_lengths(monkeypatch):
    """On a GPU; flash attention of varying lengths is stood in for by an operation that looks at its bounds."""
    monkeypatch.setattr(
        torch.ops.aten,
        "_flash_attention_forward",
        lambda query, key, value, bounds, *_: (
            (query + key + value) * bounds.sum().to(value.dtype),
            None,
            None,
            None,
            None,
        ),
    )
    backend = CompileCounterWithBackend("eager")  # others ask the operation for its kernels
    plain, compiled = make_models(backend, 0.0, torch.float32)
    for lengths in ([30, 20, 7], [48, 48], [12, 2, 2]):
        layout = FlatLayout.of_shape(np.array(lengths), None, 128, 48)
        batch = MicroBatch(torch.randint(4, 99, (128,)), None, torch.arange(5), torch.arange(5), 0, 0, None, layout)
        losses = [model(batch)["loss"] for model in (plain, compiled)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        assert backend.frame_count == 1
    assert not counters["graph_break"]
    assert_same_gradients(compiled, plain, 1e-5)


def test_on_a_cpu_dropout_draws_what_it_draws_without_compilation():
    backend = CompileCounterWithBackend("eager")
    plain, compiled = make_models(backend, 0.1, torch.bfloat16)
    counts = []
    for seed in range(2):
        for case in (CASES[0], CASES[3], CASES[4]):
            assert take(compiled, *case, 7 + seed, seed) == take(plain, *case, 7 + seed, seed)
        counts.append(backend.frame_count)
    assert counts[0] == counts[1] > 0
    assert_same_gradients(compiled, plain, 1e-6)


@pytest.mark.parametrize("disabled", ["0", "1"])
def test_layers_that_torch_leaves_uncompiled_are_reported(gpu_kernels, monkeypatch, caplog, disabled):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", disabled)
    plain, compiled = make_models("eager", 0.0, torch.float32)
    case = (32, True, True)
    assert take(compiled, *case, 5) == take(plain, *case, 5)
    assert compiled_graphs() == (disabled == "0")
    assert ("the layers run uncompiled" in caplog.text) == (disabled == "1")


@needs_compiler
@pytest.mark.slow
def test_inductor_computes_the_same(gpu_kernels):
    plain, compiled = make_models("inductor", 0.0, torch.float32, whole=True)
    case = (32, True, True)
    quick = {"aot_inductor.debug_compile": True, "cpp.simdlen": 1, "compile_threads": 1}  # g++ without optimization
    with torch._inductor.config.patch(quick):
        torch.testing.assert_close(take(compiled, *case, 5), take(plain, *case, 5))
    assert_same_gradients(compiled, plain, 1e-5)
