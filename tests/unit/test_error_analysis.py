"""What fine-tuning writes about errors: counts are scikit-learn's, losses torch's, for each task."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, multilabel_confusion_matrix
from torch.nn import functional

from ds_roberta.finetuning.classification import Classification, Regression, classification_metrics
from ds_roberta.finetuning.error_analysis import LONGEST_TEXT, WORST_EXAMPLES
from ds_roberta.finetuning.labelled_tables import Text
from ds_roberta.finetuning.labels import Labels
from ds_roberta.finetuning.multi_label import MultiLabelClassification, MultiLabelOptions
from ds_roberta.finetuning.tagged_sentences import Sentence
from ds_roberta.finetuning.task import Encoded
from ds_roberta.finetuning.token_classification import TagColumns, TokenClassification, WordWindow

NAMES = ["a", "b", "c"]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def texts(labels):
    return Encoded(
        [Text(f"dev, row {number}", f"text {number}", None, label) for number, label in enumerate(labels)], []
    )


def matrix(found):
    return [[found["confusion"][gold].get(name, 0) for name in found["labels"]] for gold in found["labels"]]


def test_classes(rng):
    logits, labels = rng.normal(size=(200, 3)).astype(np.float32), rng.integers(2, size=200).tolist()  # none of c
    found = Classification(NAMES, Labels()).error_analysis(texts(labels), logits)
    predicted = logits.argmax(-1)
    assert (found["labels"], found["unit"]) == (NAMES, "examples")
    assert matrix(found) == confusion_matrix(labels, predicted, labels=range(3)).tolist()
    losses = functional.cross_entropy(torch.tensor(logits), torch.tensor(labels), reduction="none")
    order = losses.argsort(descending=True)[:WORST_EXAMPLES].tolist()
    assert [each["place"] for each in found["worst"]] == [f"dev, row {number}" for number in order]
    worst, number = found["worst"][0], order[0]
    assert (worst["gold"], worst["predicted"]) == (NAMES[labels[number]], NAMES[predicted[number]])
    probabilities = torch.tensor(logits[number]).softmax(-1)
    assert worst["loss"] == pytest.approx(losses[number].item())
    assert worst["gold_probability"] == pytest.approx(probabilities[labels[number]].item())
    assert worst["predicted_probability"] == pytest.approx(probabilities.max().item())


def test_several_labels(rng):
    logits, labels = rng.normal(size=(80, 3)), rng.integers(2, size=(80, 3))
    task = MultiLabelClassification(NAMES, MultiLabelOptions(), threshold=0.6)
    found = task.error_analysis(texts([tuple(map(float, row)) for row in labels]), logits)
    predicted = 1 / (1 + np.exp(-logits)) > 0.6
    for name, ((_, false_positives), (false_negatives, true_positives)) in zip(
        NAMES, multilabel_confusion_matrix(labels, predicted).tolist(), strict=True
    ):
        assert found["label_counts"][name] == {
            "true_positives": true_positives,
            "false_positives": false_positives,
            "false_negatives": false_negatives,
        }
    losses = functional.binary_cross_entropy_with_logits(
        torch.tensor(logits), torch.tensor(labels, dtype=torch.float64), reduction="none"
    ).mean(-1)
    number, worst = int(losses.argmax()), found["worst"][0]
    assert (worst["place"], worst["loss"]) == (f"dev, row {number}", pytest.approx(losses[number].item()))
    for key, kind in (("gold", labels[number] == 1), ("predicted", predicted[number])):
        assert worst[key] == ", ".join(np.array(NAMES)[kind])
        exactly = np.where(kind, 1 / (1 + np.exp(-logits[number])), 1 / (1 + np.exp(logits[number])))
        assert worst[f"{key}_probability"] == pytest.approx(exactly.prod())


def test_numbers():
    found = Regression(Labels()).error_analysis(texts([1.0, 2.0, 3.5]), np.array([[1.5], [-1.0], [3.5]]))
    shown = [(each["place"], each["gold"], each["predicted"], each["loss"]) for each in found["worst"]]
    assert shown == [
        ("dev, row 1", "2", "-1", 9.0),
        ("dev, row 0", "1", "1.5", 0.25),
        ("dev, row 2", "3.5", "3.5", 0.0),
    ]
    assert found.keys() == {"worst"}


def test_tags_count_by_their_type_and_sentences_by_their_words(rng):
    names = ["O", "B-LOC", "B-PER", "I-PER"]
    sentences = [Sentence("dev, row 1", ("Ada", "Bell", "left"), ("B-PER", "I-PER", "O")),
                 Sentence("dev, row 5", ("in", "York"), ("O", "I-LOC"))]  # fmt: skip
    windows = [WordWindow(0, [0] * 5, [0, 1, 2], [1, 2, 3]), WordWindow(1, [0] * 4, [0, 1], [1, 2])]
    logits = [np.log(np.full((5, 4), 0.1)) for _ in windows]
    for window, position, tag in ((0, 1, 2), (0, 2, 1), (0, 3, 0), (1, 1, 0), (1, 2, 1)):
        logits[window][position, tag] = np.log(0.7)
    found = TokenClassification(names, TagColumns()).error_analysis(Encoded(sentences, [], windows), logits)
    assert found["labels"] == ["O", "LOC", "PER"]
    assert matrix(found) == [[2, 0, 0], [0, 0, 0], [0, 1, 1]]  # I-LOC, which training does not have, is left out
    first, second = found["worst"]
    assert (first["text"], first["gold"], first["predicted"]) == ("Ada Bell left", "Bell/I-PER", "Bell/B-LOC")
    assert first["loss"] == pytest.approx(-np.log([0.7, 0.1, 0.7]).mean())
    assert (second["gold"], second["predicted"]) == ("York/I-LOC", "York/B-LOC")
    assert second["loss"] == pytest.approx(-np.log(0.7))


def test_long_texts_are_cut_and_are_one_line():
    text = Text("dev, row 1", "line\n\n" + "x" * 999, "second", 0)
    (worst,) = Classification(NAMES, Labels()).error_analysis(Encoded([text], []), np.zeros((1, 3)))["worst"]
    first, second = worst["text"].split(" | ")
    assert (first[:6], first[-1], len(first), second) == ("line x", "…", LONGEST_TEXT, "second")


def test_a_probability_of_zero_has_a_finite_loss():
    found = Classification(NAMES, Labels()).error_analysis(texts([0]), np.array([[-1e4, 1e4, 0.0]]))
    assert found["worst"][0]["loss"] == pytest.approx(2e4)


def test_a_single_example_is_measured_without_a_warning():
    metrics = classification_metrics(np.array([[1.0, 0.0]]), np.array([0]))
    assert metrics == {"accuracy": 1.0, "macro_f1": 1.0, "matthews_correlation": 0.0, "f1": 0.0}
