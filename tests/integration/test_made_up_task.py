"""A task is one class: with a new one in `TASKS`, the command line, fine-tuning and predictions know it."""

import json
import runpy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from torch.nn import functional

from ds_roberta.finetuning import TASKS
from ds_roberta.finetuning.finetune import finetune
from ds_roberta.finetuning.labelled_tables import read_splits, read_table
from ds_roberta.finetuning.predict import PredictConfig, predict
from ds_roberta.finetuning.task import Answer, Encoded, Task, label_head, label_names
from ds_roberta.options import Settings, option

FINETUNE = Path(__file__).parents[2] / "launch/finetune.py"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Trainer's


@dataclass(frozen=True)
class TopicOptions(Settings):
    """Topics."""

    topic_threshold: float = option("the logit above which a text has a topic", 0.0)


class Topics(Task):
    """Any number of topics for each text."""

    name = "topics"
    architecture = "RobertaForSequenceClassification"
    options_class = TopicOptions
    metric_names = ("agreement",)

    def __init__(self, names, options):
        self.names, self.options = names, options
        self.head = {**label_head(names), "problem_type": "multi_label_classification"}
        self.results = {"topic_threshold": options.topic_threshold}

    @classmethod
    def from_data(cls, data, options):
        splits = read_splits(data, (".jsonl",), lambda path: read_table(path).rows)
        return cls(sorted({topic for row in splits["train"] for topic in row["topics"]}), options), splits

    @classmethod
    def from_model(cls, config, results, given):
        return cls(label_names(config), TopicOptions(results["topic_threshold"]))

    def read_inputs(self, path):
        return read_table(path).rows

    def make_input(self, text, text_pair):
        return {"text": text}

    def encode(self, tokenizer, inputs, max_seq_length):
        cut = partial(tokenizer, truncation=True, max_length=max_seq_length)
        return Encoded(
            inputs,
            [
                {**cut(row["text"]), "labels": [float(name in row.get("topics", ())) for name in self.names]}
                for row in inputs
            ],
        )

    @staticmethod
    def loss(outputs, labels, num_items_in_batch=None):
        summed = functional.binary_cross_entropy_with_logits(outputs["logits"], labels, reduction="sum")
        return summed / (labels.numel() if num_items_in_batch is None else num_items_in_batch)

    def metrics(self, encoded, logits):
        labels = np.array([feature["labels"] for feature in encoded.features])
        return {"agreement": float(((logits > self.options.topic_threshold) == labels).mean())}

    def answer(self, encoded, logits):
        found = [
            [name for name, logit in zip(self.names, of_text, strict=True) if logit > self.options.topic_threshold]
            for of_text in logits
        ]
        return [
            Answer([f"{row['text']}: {topics}"], {"topics": topics})
            for row, topics in zip(encoded.inputs, found, strict=True)
        ]


def test_it_goes_from_the_command_line_to_answers(roberta_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, Topics.name, Topics)
    script = runpy.run_path(str(FINETUNE))
    words = ("karen", "sulto")
    rows = [
        {"text": f"minka {' '.join(topics)} shendu", "topics": topics}
        for topics in ([], ["karen"], ["sulto"], ["karen", "sulto"])
    ] * 16
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--model", roberta_folder, "--task", "topics", "--data", tmp_path, "--output_dir", tmp_path / "tuned")
    settings = ("--learning_rate", "1e-2", "--num_train_epochs", "8", "--topic_threshold", "0.5")
    config = script["config_of"](script["parse_arguments"]([*map(str, arguments), *settings]))
    assert finetune(config) == 0
    results = json.loads((tmp_path / "tuned/results.json").read_text())
    assert (results["task"], results["metric"], results["topic_threshold"]) == ("topics", "agreement", 0.5)
    assert results["best"]["validation"]["agreement"] > 0.5  # of an empty answer
    answers = predict(PredictConfig(tmp_path / "tuned", tmp_path / "dev.jsonl"))
    right = [[word in answer.row["topics"] for word in words] for answer in answers]
    expected = [[word in row["topics"] for word in words] for row in rows]
    assert np.mean(np.array(right) == expected) == results["best"]["validation"]["agreement"]
    capsys.readouterr()
    predict(PredictConfig(tmp_path / "tuned", text="minka karen shendu"))
    assert capsys.readouterr().out.startswith("minka karen shendu: [")
