"""Random token substitution: its data, its loss, its export."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from sklearn.metrics import precision_recall_fscore_support

from ds_roberta.config import MaskingConfig, PackingConfig, model_config
from ds_roberta.data.global_batch import EMPTY_PLACE
from ds_roberta.data.loader import Collator, Counts
from ds_roberta.data.masking import Substituter, evaluation_masker, training_masker
from ds_roberta.data.packing import build_index, open_index
from ds_roberta.data.tokenizer import TokenizerInfo
from ds_roberta.errors import UserError
from ds_roberta.evaluation.roberta_folder import open_roberta
from ds_roberta.model.export import check_parity, export, hf_config, known_to_transformers, to_transformers
from ds_roberta.model.objectives import MaskedLM, RandomTokenSubstitution
from ds_roberta.training.micro_batch import full_micro_batch

LENGTH, ROWS = 32, 3000
SPECIAL = (0, 1, 2, 3, 999)
TOKENIZER = TokenizerInfo(1000, 0, 1, 2, 999, SPECIAL, "f")


@pytest.fixture(scope="module")
def original():
    ids = np.random.default_rng(0).integers(4, 999, size=(ROWS, LENGTH))
    ids[:, 0], ids[:, -1] = 0, 2
    ids[:5, 20:] = 1  # padding
    return ids


def substitute(original, places=None, **masking):
    masker = training_masker(MaskingConfig(**masking), TOKENIZER, 1, kind=Substituter)
    ids = original.copy()
    positions, labels = masker.mask(ids, np.arange(len(ids)) if places is None else places)
    return ids, positions, labels


def test_every_ordinary_token_has_a_label_that_says_whether_it_changed(original):
    ids, positions, labels = substitute(original)
    assert (positions == np.flatnonzero(~np.isin(original, SPECIAL))).all()
    assert (labels == (ids != original).reshape(-1)[positions]).all()
    assert not np.isin(ids.reshape(-1)[positions], SPECIAL).any()
    assert (ids[np.isin(original, SPECIAL)] == original[np.isin(original, SPECIAL)]).all()


def test_the_share_is_mlm_probability_but_for_tokens_drawn_for_themselves(original):
    _, _, labels = substitute(original, mlm_probability=0.3)
    assert labels.mean() == pytest.approx(0.3 * (1 - 1 / 995), abs=0.003)


def test_the_chosen_places_are_those_of_masking(original):
    _, positions, labels = substitute(original)
    masked = original.copy()
    chosen, _ = training_masker(MaskingConfig(), TOKENIZER, 1).mask(masked, np.arange(ROWS))
    replaced = positions[labels == 1]
    assert np.isin(replaced, chosen).all()
    assert len(replaced) > 0.99 * len(chosen)


def test_a_place_decides_its_substitutions(original):
    ids, _, _ = substitute(original)
    places = np.arange(ROWS)[::-1]
    again, _, _ = substitute(original[::-1], places)
    assert (again[::-1] == ids).all()
    assert (substitute(original, np.arange(ROWS) + ROWS)[0] != ids).any()


@pytest.fixture(scope="module")
def config():
    return model_config("tiny", 400, LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(scope="module")
def model(config):
    torch.manual_seed(0)
    model = RandomTokenSubstitution(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(scope="module")
def collator(corpus):
    packing, tokenizer = PackingConfig(LENGTH), corpus.manifest.tokenizer
    build_index(corpus, "validation", packing)
    packed = open_index(corpus, "validation", packing)
    return Collator(packed, evaluation_masker(MaskingConfig(), tokenizer, kind=Substituter), tokenizer, LENGTH)


def test_losses_gradients_and_counts_are_those_of_a_plain_computation(config, model, collator):
    batch = collator.collate(np.arange(6), np.arange(6))
    theirs = transformers.RobertaModel(hf_config(config), add_pooling_layer=False).eval()
    encoder = {name.removeprefix("roberta."): weight for name, weight in model.state_dict().items()}
    theirs.load_state_dict({name: encoder[name] for name in dict(theirs.named_parameters())}, strict=False)
    hidden = theirs(batch.input_ids, batch.attention_mask)[0].flatten(0, 1)[batch.masked_positions]
    head = model.substitution_head
    logits = head.classifier(F.gelu(head.dense(hidden))).squeeze(-1)
    expected = F.binary_cross_entropy_with_logits(logits, batch.labels.float())
    expected.backward()
    sums = model(batch)
    found = model.metrics({name: value.item() for name, value in sums.items()}, batch.counts)
    assert found.pop("loss") == pytest.approx(expected.item(), rel=1e-5)
    model.zero_grad()
    (model.weigh(sums, batch.counts) / len(batch.labels)).backward()
    for name, parameter in theirs.named_parameters():
        ours = dict(model.roberta.named_parameters())[name].grad
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-6)
    model.zero_grad()
    predicted = (logits > 0).long()
    assert sums["found"] == (predicted & batch.labels).sum()
    assert sums["predicted"] == predicted.sum()
    assert sums["replaced"] == batch.labels.sum()
    precision, recall, f1, _ = precision_recall_fscore_support(batch.labels, predicted, average="binary")
    expected = {"detection_precision": precision, "detection_recall": recall, "detection_f1": f1}
    assert found == pytest.approx(expected)


def test_counts_of_nothing_have_no_measure():
    sums = dict.fromkeys(("loss", "found", "predicted", "replaced"), 0.0)
    assert set(RandomTokenSubstitution.metrics(sums, Counts(1, 1, 1)).values()) == {0.0}


def test_empty_places_have_no_weight(model, collator):
    places = np.array([0, 1, 2, EMPTY_PLACE])
    padded = collator.collate(places.clip(min=0), places)
    alone = collator.collate(places[:3], places[:3])
    torch.testing.assert_close(model(padded), model(alone))
    nothing = collator.collate(np.zeros(2, dtype=np.int64), np.full(2, EMPTY_PLACE))
    assert model(nothing) == dict.fromkeys(("loss", "found", "predicted", "replaced"), 0.0)


def test_a_trial_of_micro_batches_labels_all_tokens(model):
    batch = full_micro_batch(2, LENGTH, MaskingConfig(), model.masker)
    assert len(batch.labels) == 2 * LENGTH
    assert model(batch)["loss"] > 0


def test_the_model_has_no_vocabulary_projection(config):
    width, names = config.hidden_size, dict(RandomTokenSubstitution(config).named_parameters())
    assert {name for name in names if not name.startswith("roberta.")} == {
        f"substitution_head.{module}.{kind}" for module in ("dense", "classifier") for kind in ("weight", "bias")
    }
    difference = MaskedLM.flops_per_token(config, LENGTH, 0.15)
    difference -= RandomTokenSubstitution.flops_per_token(config, LENGTH, 0.9)
    assert difference == pytest.approx(6 * (0.15 * (width**2 + 400 * width) - 0.9 * (width**2 + width)))


def encoder_weights(model):
    named = model.named_parameters()
    return {name: value.detach() for name, value in named if known_to_transformers(name)}


def test_the_exported_folder_is_the_encoder_and_opens_everywhere(tmp_path, config, model, collator, tokenizer_folder):
    weights = encoder_weights(model)
    assert export(config, weights, tokenizer_folder, LENGTH, tmp_path / "model", "card") < 1e-5
    assert json.loads((tmp_path / "model/config.json").read_text())["architectures"] == ["RobertaModel"]
    batch = collator.collate(np.arange(3), np.arange(3))
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        expected = theirs(batch.input_ids, batch.attention_mask)[0].flatten(0, 1)[batch.masked_positions]
        found = model.roberta(batch.input_ids, batch.attention_mask).flatten(0, 1)[batch.masked_positions]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    classifier, report = transformers.RobertaForSequenceClassification.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert all(name.startswith("classifier.") for name in report["missing_keys"])
    assert torch.equal(
        classifier.roberta.embeddings.word_embeddings.weight, weights["roberta.embeddings.word_embeddings.weight"]
    )
    with pytest.raises(UserError, match=r"lacks .*choose the folder of a pretrained RobertaForMaskedLM"):
        open_roberta(tmp_path / "model")


def test_an_encoder_that_differs_is_not_exported(config, model):
    weights = encoder_weights(model)
    other = to_transformers(config, weights)
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight.mul_(1.5)
    with pytest.raises(UserError, match="hidden states differ"):
        check_parity(config, weights, other)
