"""Masked language modelling whose masked tokens are also predicted from `<s>`."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from ds_roberta.config import MaskingConfig, PackingConfig, model_config
from ds_roberta.data.global_batch import EMPTY_PLACE
from ds_roberta.data.loader import Collator
from ds_roberta.data.masking import evaluation_masker
from ds_roberta.data.packing import build_index, open_index
from ds_roberta.model.export import hf_config
from ds_roberta.model.objectives import MaskedLM, MaskedLMWithBagOfWords

LENGTH = 32


@pytest.fixture(scope="module")
def config():
    return model_config("tiny", 400, LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return MaskedLMWithBagOfWords(config).eval()


@pytest.fixture(scope="module")
def collate(corpus):
    """A function that makes a batch of held-out sequences at some places, with padding or without."""
    packing, tokenizer = PackingConfig(LENGTH, "doc-sentences"), corpus.manifest.tokenizer
    build_index(corpus, "validation", packing)
    packed, masker = open_index(corpus, "validation", packing), evaluation_masker(MaskingConfig(), tokenizer)

    def of_places(places, padded=True):
        places = np.array(places)
        return Collator(packed, masker, tokenizer, LENGTH, padded=padded).collate(places.clip(min=0), places)

    return of_places


def test_losses_and_gradients_are_those_of_transformers_logits(config, model, collate):
    batch = collate(range(6))
    theirs = transformers.RobertaForMaskedLM(hf_config(config)).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    theirs.tie_weights()
    labels = torch.full(batch.input_ids.shape, -100)
    labels.view(-1)[batch.masked_positions] = batch.labels
    out = theirs(batch.input_ids, batch.attention_mask, labels=labels)
    from_first = out.logits[:, :1].expand_as(out.logits)
    bow_loss = F.cross_entropy(from_first.flatten(0, 1), labels.flatten())
    expected = out.loss + MaskedLMWithBagOfWords.weight * bow_loss
    expected.backward()

    sums = model(batch)
    assert {value.dtype for value in sums.values()} == {torch.float32}
    metrics = model.metrics({name: value.item() for name, value in sums.items()}, batch.counts)
    assert metrics["mlm_loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    assert metrics["bow_loss"] == pytest.approx(bow_loss.item(), rel=1e-5)
    loss = model.weigh(sums, batch.counts) / len(batch.labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    ours = dict(model.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-3, atol=1e-6)


def test_without_padding_the_losses_are_the_same(model, collate):
    padded, flat = collate(range(12)), collate(range(12), padded=False)
    assert padded.attention_mask is not None
    assert flat.layout is not None
    torch.testing.assert_close(model(flat), model(padded))


def test_empty_places_have_no_weight(model, collate):
    torch.testing.assert_close(model(collate([0, 1, 2, EMPTY_PLACE])), model(collate([0, 1, 2])))
    nothing = model(collate([EMPTY_PLACE] * 2))
    assert nothing == {"mlm_loss": 0.0, "bow_loss": 0.0}
    model.weigh(nothing, collate([0]).counts).backward()  # as every process of a step must


def test_the_held_out_loss_is_that_of_the_tokens_own_places(config, model, collate):
    torch.manual_seed(0)
    plain, batch = MaskedLM(config).eval(), collate(range(6))
    sums = {name: value.item() for name, value in model(batch).items()}
    evaluation = model.evaluation(sums, batch.counts)
    expected = plain.evaluation({"loss": plain(batch)["loss"].item()}, batch.counts)
    assert {name: evaluation[name] for name in expected} == pytest.approx(expected)
    assert evaluation["bow_loss"] == sums["bow_loss"] / batch.counts.labels


def test_the_work_is_one_row_of_the_head_more_for_each_sequence(config):
    small = dataclasses.replace(config, vocab_size=1_000)
    more = MaskedLMWithBagOfWords.flops_per_token(small, LENGTH, 0.15) - MaskedLM.flops_per_token(small, LENGTH, 0.15)
    assert more * LENGTH == pytest.approx(6 * MaskedLM.head_parameters(small))


@torch.no_grad()
def test_a_compiled_head_sees_few_numbers_of_sequences(corpus, model):
    masker = evaluation_masker(MaskingConfig(), corpus.manifest.tokenizer)
    build_index(corpus, "validation", PackingConfig(LENGTH))
    packed = open_index(corpus, "validation", PackingConfig(LENGTH))
    collator = Collator(packed, masker, corpus.manifest.tokenizer, LENGTH)
    rows, head = [], model.lm_head.forward
    model.lm_head.forward = lambda hidden, *others: rows.append(len(hidden)) or head(hidden, *others)
    batches = [collator.collate(np.arange(size), np.arange(size)) for size in (3, 5, 8)]
    usual = [{name: float(value) for name, value in model(batch).items()} for batch in batches]
    assert rows[1::2] == [3, 5, 8]
    model.head_shapes = 4
    padded = [{name: float(value) for name, value in model(batch).items()} for batch in batches]
    assert rows[7::2] == [16, 16, 16]
    assert [each["bow_loss"] for each in padded] == pytest.approx([each["bow_loss"] for each in usual], rel=1e-5)
