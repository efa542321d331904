import copy
from dataclasses import replace

import pytest
import torch
import transformers

from ds_roberta.config import PRESETS, model_config
from ds_roberta.data.loader import MicroBatch
from ds_roberta.model.export import hf_config
from ds_roberta.model.objectives import MaskedLM

VOCABULARY, BATCH, LENGTH = 500, 3, 40


@pytest.fixture(scope="module")
def config():
    return model_config("tiny", VOCABULARY, 128)


@pytest.fixture(scope="module")
def pair(config):
    """Our model and transformers', with the same weights, none of them zero or one."""
    torch.manual_seed(0)
    theirs = transformers.RobertaForMaskedLM(hf_config(config)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    ours = MaskedLM(config).eval()
    ours.load_state_dict(dict(theirs.named_parameters()))
    return ours, theirs


@pytest.fixture(scope="module")
def batch():
    """Ids, attention mask (rows of 40, 25 and 2 tokens), and flat positions to predict with their labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCABULARY, (BATCH, LENGTH), generator=generator)
    lengths = torch.tensor([LENGTH, 25, 2])
    mask = torch.arange(LENGTH) < lengths[:, None]
    ids[~mask] = 1
    labels_BT = torch.where(mask & (torch.rand(ids.shape, generator=generator) < 0.3), ids, -100)
    positions = (labels_BT != -100).flatten().nonzero().flatten()
    assert len(positions) > 10
    return ids, mask, positions, labels_BT.flatten()[positions], labels_BT


def loss_sum(model, ids, mask, positions, labels):
    return model(MicroBatch(ids, mask, positions, labels, tokens=0, sequences=len(ids)))["loss"]


@pytest.mark.parametrize("preset", PRESETS)
def test_names_shapes_and_numbers_are_those_of_transformers(preset):
    config = model_config(preset, 50_265, 512)
    with torch.device("meta"):
        ours, theirs = MaskedLM(config), transformers.RobertaForMaskedLM(hf_config(config))
    shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("preset", "parameters"), [("base", 124_697_433), ("large", 355_412_057)])
def test_base_and_large_are_the_published_models(preset, parameters):
    with torch.device("meta"):
        model = MaskedLM(model_config(preset, 50_265, 512))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_logits_equal_those_of_transformers(pair, batch):
    ours, theirs = pair
    ids = batch[0].clamp(min=4)
    with torch.no_grad():
        mine = ours.logits(ids, None, torch.arange(BATCH * LENGTH))
        expected = theirs(input_ids=ids).logits.flatten(0, 1)
    assert expected.abs().max() > 0.5
    assert (mine - expected).abs().max() <= 1e-5


def test_logits_equal_those_of_transformers_with_padding(pair, batch):
    ours, theirs = pair
    ids, mask, *_ = batch
    tokens = mask.flatten().nonzero().flatten()
    with torch.no_grad():
        mine = ours.logits(ids, mask, tokens)
        expected = theirs(input_ids=ids, attention_mask=mask).logits.flatten(0, 1)[tokens]
    assert (mine - expected).abs().max() <= 1e-5


def test_padding_changes_nothing_for_the_tokens(pair, batch):
    ours, _ = pair
    ids, mask, *_ = batch
    with torch.no_grad():
        padded = ours.logits(ids[1:2], mask[1:2], torch.arange(25))
        alone = ours.logits(ids[1:2, :25], None, torch.arange(25))
    assert (padded - alone).abs().max() <= 1e-5


def test_longest_sequences_use_the_last_position(config):
    model = MaskedLM(config).eval()
    ids = torch.full((1, 512), 5)
    model.logits(ids, None, torch.tensor([511])).sum().backward()
    used = model.roberta.embeddings.position_embeddings.weight.grad.abs().sum(dim=1) > 0
    assert used.nonzero().flatten().tolist() == list(range(2, 514))
    with pytest.raises(IndexError):
        model.logits(torch.full((1, 513), 5), None, torch.tensor([0]))


def test_the_loss_is_the_sum_of_which_transformers_gives_the_mean(pair, batch):
    ours, theirs = pair
    ids, mask, positions, labels, labels_BT = batch
    with torch.no_grad():
        mine = loss_sum(ours, ids, mask, positions, labels)
        expected = theirs(input_ids=ids, attention_mask=mask, labels=labels_BT).loss
    assert mine.dtype == torch.float32
    assert mine.shape == ()
    assert mine.item() / len(labels) == pytest.approx(expected.item(), rel=1e-6)


def test_gradients_of_all_parameters_equal_those_of_transformers(pair, batch):
    ours, theirs = pair
    ids, mask, positions, labels, labels_BT = batch
    for model in pair:
        model.zero_grad(set_to_none=True)
    (loss_sum(ours, ids, mask, positions, labels) / len(labels)).backward()
    theirs(input_ids=ids, attention_mask=mask, labels=labels_BT).loss.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        difference = (parameter.grad - expected[name].grad).abs().max()
        # The keys' bias moves all scores alike: its true gradient is zero and both are rounding.
        scale = 1.0 if name.endswith("key.bias") else expected[name].grad.abs().max()
        assert scale > 0, name
        assert difference <= 1e-5 * max(scale, 0.1), name


def test_no_labels_give_a_zero_loss_and_zero_gradients_for_all_parameters(pair, batch):
    ours, _ = pair
    ids, mask, *_ = batch
    ours.zero_grad(set_to_none=True)
    nothing = torch.empty(0, dtype=torch.int64)
    loss = loss_sum(ours, ids, mask, nothing, nothing)
    assert loss.item() == 0
    loss.backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_empty_places_change_neither_loss_nor_gradient(pair, batch):
    ours, _ = pair
    ids, mask, positions, labels, _ = batch
    empty_row = torch.tensor([[0, 2] + [1] * (LENGTH - 2)])
    results = []
    for extra in (0, 2):
        ours.zero_grad(set_to_none=True)
        more_ids = torch.cat([ids, *[empty_row] * extra])
        loss = loss_sum(ours, more_ids, torch.cat([mask, *[empty_row != 1] * extra]), positions, labels)
        loss.backward()
        results.append((loss.detach(), [parameter.grad for parameter in ours.parameters()]))
    assert results[0][0].item() == pytest.approx(results[1][0].item(), rel=1e-6)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_the_loss_of_a_bf16_model_is_summed_in_fp32(config, batch):
    ids, mask, positions, labels, _ = batch
    model = MaskedLM(config).bfloat16().eval()
    with torch.no_grad():
        assert model.logits(ids, mask, positions).dtype == torch.bfloat16
        assert loss_sum(model, ids, mask, positions, labels).dtype == torch.float32


def test_every_gradient_of_a_long_micro_batch_in_bf16_is_nearly_that_in_fp32(config):
    torch.manual_seed(0)
    exact = MaskedLM(replace(config, hidden_size=64, num_hidden_layers=1, intermediate_size=64)).eval()
    rounded = copy.deepcopy(exact).bfloat16()
    ids = torch.randint(4, VOCABULARY // 50, (64, 128))
    positions = torch.arange(0, ids.numel(), 4)
    mask = torch.ones_like(ids, dtype=torch.bool)
    for model in (exact, rounded):
        (loss_sum(model, ids, mask, positions, ids.flatten()[positions]) / len(positions)).backward()
    for (name, expected), found in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        if not name.endswith("key.bias"):  # whose gradient is zero
            error = (found.grad.float() - expected.grad).norm() / expected.grad.norm().clamp(min=1e-12)
            assert error < 0.03, name


def test_dropout_is_on_in_training_alone(batch):
    ids, mask, positions, labels, _ = batch
    for dropouts in ((0.1, 0.0), (0.0, 0.1), (0.0, 0.0)):
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        model = MaskedLM(model_config("tiny", VOCABULARY, 128, **dict(zip(names, dropouts, strict=True))))
        model.train()
        with torch.no_grad():
            trained = {loss_sum(model, ids, mask, positions, labels).item() for _ in range(3)}
            model.eval()
            evaluated = {loss_sum(model, ids, mask, positions, labels).item() for _ in range(3)}
        assert len(trained) == (3 if any(dropouts) else 1)
        assert len(evaluated) == 1


def test_initial_weights_are_berts(config):
    torch.manual_seed(3)
    model = MaskedLM(config)
    embeddings = model.roberta.embeddings
    assert embeddings.word_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not embeddings.word_embeddings.weight[1].any()
    assert not embeddings.position_embeddings.weight[1].any()
    for name, parameter in model.named_parameters():
        if name.endswith("dense.weight"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03)
            assert abs(parameter.mean().item()) < 1e-3
        elif name.endswith("bias"):
            assert not parameter.any()
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), MaskedLM(config).parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_layers_have_the_same_gradients_and_keep_only_their_inputs(config, batch, dtype):
    config = replace(config, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    torch.manual_seed(0)
    model = MaskedLM(config).to(dtype)
    ids, mask, positions, labels, _ = batch

    def gradients_and_kept_bytes(layers):
        model.roberta.encoder.recomputed_layers = layers
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        model.zero_grad()
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_sum(model, ids, mask, positions, labels)
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()], kept

    (expected, most), *found = [gradients_and_kept_bytes(layers) for layers in (0, 1, config.num_hidden_layers)]
    for gradients, _ in found:
        assert all(map(torch.equal, gradients, expected))
    one_layer = most - found[0][1]
    assert most - found[1][1] == config.num_hidden_layers * one_layer > 0


def test_an_evaluation_recomputes_nothing(pair, batch, monkeypatch):
    ours, _ = pair
    monkeypatch.setattr(ours.roberta.encoder, "recomputed_layers", 2)
    monkeypatch.setattr("ds_roberta.model.encoder.checkpoint", None)
    ids, mask, positions, labels, _ = batch
    loss_sum(ours, ids, mask, positions, labels)
