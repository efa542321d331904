"""Our own dropout, attention and cross-entropy, compared with torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ds_roberta.model.kernels import (
    Dropout,
    Embedding,
    LayerNorm,
    attention,
    cross_entropy_by_rows,
    keep_mask,
    linear_cross_entropy,
    set_gpu_arithmetic,
    whole_cross_entropy,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("shape", [(8192,), (64, 128)])
def test_gradients_in_16_bits_are_added_up_exactly(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(*shape, 64, generator=generator)
    gradient = 0.1 * torch.randn(*shape, 64, generator=generator) + 0.02
    ids = torch.randint(5, shape, generator=generator) ** 2

    def gradients(norm, table, dtype):
        torch.manual_seed(0)
        module = nn.ModuleList([norm(64), table(20, 64)]).to(dtype)
        own = values.to(dtype).requires_grad_()
        (module[0](own) + module[1](ids)).backward(gradient.to(dtype))
        return [tensor.grad.double() for tensor in (own, *module.parameters())]

    exact = gradients(nn.LayerNorm, nn.Embedding, torch.float64)
    for mine, expected in zip(gradients(LayerNorm, Embedding, dtype), exact, strict=True):
        assert (mine - expected).norm() < 0.01 * expected.norm()
    for mine, expected in zip(gradients(LayerNorm, Embedding, torch.float64), exact, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.0001])
def test_a_mask_drops_the_share_asked_for_and_follows_the_seed(p):
    torch.manual_seed(3)
    keep = keep_mask(torch.Size((999, 1001)), p)
    assert set(keep.unique().tolist()) <= {0, 1}
    dropped = (keep == 0).double().mean().item()
    assert dropped == pytest.approx(p, abs=4 * (p / keep.numel()) ** 0.5 + 1 / 65536)
    assert not torch.equal(keep, keep_mask(keep.shape, p))
    torch.manual_seed(3)
    assert torch.equal(keep, keep_mask(keep.shape, p))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_zeroes_or_scales_each_value_and_its_gradient_alike(dtype):
    values = torch.randn(64, 33, dtype=dtype).requires_grad_()
    dropout = Dropout(0.25)
    dropped = dropout(values)
    dropped.backward(torch.ones_like(dropped))
    assert values.grad is not None
    kept = values.grad != 0
    assert 0.6 < kept.double().mean() < 0.9
    torch.testing.assert_close(dropped, torch.where(kept, values * (1 / 0.75), 0))
    torch.testing.assert_close(values.grad[kept].float(), torch.full((int(kept.sum()),), 4 / 3), rtol=1e-2, atol=0)
    assert dropout.eval()(values) is values


@pytest.mark.parametrize("padded", [False, True])
def test_attention_and_its_gradients_are_torchs(padded):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 7, 4, 16, generator=generator, dtype=torch.float64) for _ in range(3)]
    mask = torch.ones(3, 1, 1, 7, dtype=torch.bool)
    mask[1, ..., 4:] = not padded
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in inputs] for _ in range(2))
    result = attention(*(tensor.transpose(1, 2) for tensor in ours), mask if padded else None, 0.0)
    expected = F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in theirs), attn_mask=mask)
    torch.testing.assert_close(result, expected)
    gradient = torch.randn(result.shape, generator=generator, dtype=torch.float64)
    result.backward(gradient)
    expected.backward(gradient)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_gradients_of_attention_with_dropout_are_those_of_its_own_mask():
    inputs = [torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def seeded(*tensors):
        torch.manual_seed(1)
        return attention(*tensors, None, 0.3)

    assert torch.autograd.gradcheck(seeded, inputs)
    eyes = torch.eye(5, dtype=torch.float64).expand(1, 2, 5, 5)
    weights = attention(inputs[0], inputs[1], eyes, None, 0.3)
    whole = attention(inputs[0], inputs[1], eyes, None, 0.0)
    assert 0 < (weights == 0).double().mean() < 0.7
    torch.testing.assert_close(weights[weights != 0], (whole / 0.7)[weights != 0])


@pytest.mark.parametrize("cross_entropy", [cross_entropy_by_rows, whole_cross_entropy])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cross_entropy_and_its_gradients_are_torchs(dtype, cross_entropy):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((21, 16), (37, 16), (37,)))
    labels = torch.randint(37, (21,), generator=generator)
    ours = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias)]
    theirs = [tensor.detach().float().requires_grad_() for tensor in ours]
    loss = linear_cross_entropy(*ours, labels, cross_entropy)
    assert loss.dtype == torch.float32
    (loss * 0.01).backward()
    expected = F.cross_entropy(F.linear(*theirs), labels, reduction="sum")
    (expected * 0.01).backward()
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(loss, expected, rtol=rounding, atol=0)
    for mine, other in zip(ours, theirs, strict=True):
        largest = other.grad.abs().max().item()
        torch.testing.assert_close(mine.grad.float(), other.grad, rtol=0, atol=8 * rounding * largest)


def test_a_batch_without_masked_tokens_has_no_loss_and_no_gradient():
    hidden, weight, bias = (torch.randn(*shape).requires_grad_() for shape in ((0, 16), (37, 16), (37,)))
    loss = linear_cross_entropy(hidden, weight, bias, torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_the_loss_of_a_certain_mistake_is_finite():
    hidden, weight = torch.ones(1, 1), torch.tensor([[200.0], [0.0]])
    assert linear_cross_entropy(hidden, weight, torch.zeros(2), torch.tensor([1])) == 200


def test_rows_of_linear_cross_entropy_without_a_label_count_for_nothing():
    torch.manual_seed(0)
    hidden, weight, bias, labels = torch.randn(9, 8), torch.randn(20, 8), torch.randn(20), torch.randint(20, (6,))
    found = []
    missing = F.pad(labels, (0, 3), value=-1)
    for rows, function, given in (
        (6, cross_entropy_by_rows, labels),
        (9, cross_entropy_by_rows, labels),
        (9, whole_cross_entropy, missing),
    ):
        own = [values.clone().requires_grad_() for values in (hidden[:rows], weight, bias)]
        loss = linear_cross_entropy(*own, given, function)
        loss.backward()
        assert not own[0].grad[6:].any()
        found.append([loss.detach(), own[0].grad[:6], *(values.grad for values in own[1:])])
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, same)


def test_a_gpus_arithmetic_is_exact_whatever_the_environment_says():
    matmul = torch.backends.cuda.matmul

    def found():
        sums = (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction)
        return (torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled(), *sums)

    def choose(precision, cudnn, bf16, fp16):
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = bf16, fp16

    before = found()
    try:
        choose("high", True, True, True)
        set_gpu_arithmetic()
        assert found() == ("highest", False, False, False)
    finally:
        choose(*before)
