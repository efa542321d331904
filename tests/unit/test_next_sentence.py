"""The objective of pairs: masked language modelling and next sentence prediction."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from ds_roberta.config import MaskingConfig, PackingConfig, model_config
from ds_roberta.data.global_batch import EMPTY_PLACE
from ds_roberta.data.loader import Collator, HeldOutSample
from ds_roberta.data.masking import evaluation_masker
from ds_roberta.data.packing import build_index, open_index
from ds_roberta.model.export import hf_config, known_to_transformers
from ds_roberta.model.objectives import MaskedLM, MaskedLMWithNextSentence
from ds_roberta.training.micro_batch import full_micro_batch

LENGTH = 32


@pytest.fixture(scope="module")
def config():
    return model_config("tiny", 400, LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(scope="module")
def model(config):
    torch.manual_seed(0)
    model = MaskedLMWithNextSentence(config).eval()
    with torch.no_grad():
        for parameter in model.next_sentence_head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def collator(corpus):
    packing, tokenizer = PackingConfig(LENGTH, "segment-pair"), corpus.manifest.tokenizer
    build_index(corpus, "validation", packing)
    packed = open_index(corpus, "validation", packing)
    return Collator(packed, evaluation_masker(MaskingConfig(), tokenizer), tokenizer, LENGTH)


def test_losses_and_gradients_are_those_of_transformers_with_the_heads_of_bert(config, model, collator):
    """`BertForPreTraining`'s sum, from RoBERTa's encoder and its head: pooled `<s>`, tanh, two classes."""
    batch = collator.collate(np.arange(6), np.arange(6))
    theirs = transformers.RobertaForMaskedLM(hf_config(config)).eval()
    theirs.load_state_dict(
        {name: weight for name, weight in model.state_dict().items() if known_to_transformers(name)},
        strict=False,
    )
    theirs.tie_weights()
    head = model.next_sentence_head
    pooler = transformers.models.bert.modeling_bert.BertPooler(theirs.config)
    pooler.dense.load_state_dict(head.pooler.state_dict())
    labels = torch.full(batch.input_ids.shape, -100)
    labels.view(-1)[batch.masked_positions] = batch.labels
    out = theirs(batch.input_ids, batch.attention_mask, labels=labels, output_hidden_states=True)
    logits = F.linear(pooler(out.hidden_states[-1]), head.seq_relationship.weight, head.seq_relationship.bias)
    expected = out.loss + F.cross_entropy(logits, batch.next_sentence_labels)
    expected.backward()

    sums = model(batch)
    assert {value.dtype for value in sums.values()} == {torch.float32}
    metrics = model.metrics({name: value.item() for name, value in sums.items()}, batch.counts)
    assert metrics["mlm_loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    assert sums["nsp_correct"] == (logits.argmax(-1) == batch.next_sentence_labels).sum()
    assert metrics["nsp_accuracy"] == sums["nsp_correct"].item() / 6
    loss = model.weigh(sums, batch.counts) / len(batch.labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    pairs = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    pairs["next_sentence_head.pooler.weight"] = pooler.dense.weight.grad
    for name, gradient in pairs.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, rtol=1e-3, atol=1e-6)
    model.zero_grad()


def test_empty_places_have_no_weight(model, collator):
    places = np.array([0, 1, 2, EMPTY_PLACE])
    padded = collator.collate(places.clip(min=0), places)
    alone = collator.collate(places[:3], places[:3])
    torch.testing.assert_close(model(padded), model(alone))
    nothing = collator.collate(np.zeros(2, dtype=np.int64), np.full(2, EMPTY_PLACE))
    assert model(nothing) == {"mlm_loss": 0.0, "nsp_loss": 0.0, "nsp_correct": 0.0}


def test_a_trial_of_micro_batches_has_pairs(model):
    assert model(full_micro_batch(2, LENGTH, MaskingConfig()))["nsp_loss"] > 0


def test_the_encoder_begins_as_without_the_head(config):
    torch.manual_seed(3)
    plain = MaskedLM(config).state_dict()
    torch.manual_seed(3)
    paired = MaskedLMWithNextSentence(config).state_dict()
    assert all(torch.equal(weight, paired[name]) for name, weight in plain.items())
    assert {name for name in paired if name not in plain} == {
        name for name in paired if name.startswith("next_sentence_head.")
    }


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 50), (2, 7)])
def test_the_held_out_accuracy_counts_every_pair_once(collator, on_ranks, world_size, micro_batch_size):
    def body(ranks):
        def sums(batch):
            correct = float(batch.next_sentence_labels.sum())
            return {"mlm_loss": 2.0 * len(batch.labels), "nsp_loss": 0.5 * batch.sequences, "nsp_correct": correct}

        found = HeldOutSample(collator, 50, micro_batch_size, ranks).evaluate(sums)
        return MaskedLMWithNextSentence.evaluation(*found)

    sample = collator.packed.next_sentence_labels
    for found in on_ranks(world_size, body):
        assert (found["loss"], found["nsp_loss"]) == (2.0, 0.5)
        accuracy = found["nsp_accuracy"]
        assert 0.2 < accuracy < 0.8
        assert (accuracy * 50) == round(accuracy * 50)
    assert sample(np.arange(50)).max() == 1
