"""Readers of labelled data, with inputs for them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from benchmarks.fuzz_inputs import (
    Case,
    any_bytes,
    changed_bytes,
    changed_json,
    changed_json_lines,
    folder_with_errors,
    one_file,
)
from benchmarks.fuzz_rows import ROWS, Reader, attempt_all, only, read_documents
from ds_roberta.finetuning.classification import Classification, Regression
from ds_roberta.finetuning.labelled_tables import read_splits
from ds_roberta.finetuning.multi_label import MultiLabelClassification
from ds_roberta.finetuning.question_answering import QuestionAnswering
from ds_roberta.finetuning.task import Task
from ds_roberta.finetuning.token_classification import TokenClassification
from ds_roberta.inputs.paths import find_inputs
from ds_roberta.inputs.tables import read_table

# Labelled data

QUESTIONS: dict[str, Any] = {
    "version": "v2.0",
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": "Anna came from Ulm in 1999.",
                    "qas": [
                        {"id": "1", "question": "Who?", "answers": [{"text": "Anna", "answer_start": 0}]},
                        {"id": "2", "question": "Why?", "answers": [], "is_impossible": True},
                    ],
                },
                {
                    "context": "𠮷 eats.",
                    "qas": [{"id": 3, "question": "Who?", "answers": [{"text": "𠮷", "answer_start": 0}] * 2}],
                },
            ],
        }
    ],
}
QUESTION_ROWS = [
    {"id": "1", "question": "Who?", "context": "Anna came.", "answers": {"text": ["Anna"], "answer_start": [0]}},
    {"id": "2", "question": "Why?", "context": "Anna came.", "answers": {"text": [], "answer_start": []}},
    {"id": "3", "question": "Who?", "context": "Anna came.", "answers": [{"text": "Anna", "answer_start": 0}]},
]
CONLL = (
    b"-DOCSTART- -X- O O\n\nEU NNP I-NP B-ORG\nrejects VBZ I-VP O\n\nPeter NNP I-NP B-PER\nBlackburn NNP I-NP I-PER\n",
    "word\ttag\n# c\nGrüße\tX\nan\tY\n\nAnna\tX\n".encode(),
)
CONLLU = (
    b"# sent_id = 1\n1-2\tdu\t_\t_\t_\t_\t_\t_\t_\t_\n1\tde\tde\tADP\t_\t_\t0\troot\t_\tNER=B-X|SpaceAfter=No\n"
    b"2\tle\tle\tDET\tD\t_\t1\tdet\t_\t_\n2.1\tx\t_\tX\t_\t_\t_\t_\t_\t_\n\n1\tOui\toui\tINTJ\t_\t_\t0\troot\t_\t_\n",
)
LABELLED = [
    {"text": "one", "label": "a", "labels": ["x", "y"], "score": 1, "data": {"text": "one"}},
    {"text": "two", "label": "b", "labels": "x, y", "score": 2.5, "annotations": None},
    {"text": "three", "label": 1, "labels": "[1, 'a']", "score": "3", "entities": []},
]
SPANS = [
    {"text": "Anna came.", "label": [[0, 4, "PER"]]},
    {"text": "In Ulm 𠮷.", "label": [{"start": 3, "end": 6, "label": "LOC"}]},
    {"text": "None", "label": []},
]
LABEL_STUDIO = [
    {
        "id": 1,
        "data": {"text": "Anna came."},
        "annotations": [
            {
                "id": 2,
                "was_cancelled": False,
                "ground_truth": True,
                "result": [
                    {
                        "type": "labels",
                        "from_name": "label",
                        "to_name": "text",
                        "value": {"start": 0, "end": 4, "text": "Anna", "labels": ["PER"]},
                    },
                    {"type": "choices", "from_name": "kind", "value": {"choices": ["a"]}},
                ],
            }
        ],
    }
]
WORDS = [{"tokens": ["Anna", "came"], "ner_tags": ["B-PER", "O"]}, {"tokens": ["Ulm"], "ner_tags": ["B-LOC"]}]


def _task(*tasks: type[Task]) -> Callable[[Path], None]:
    """Read the file as the training and validation examples of tasks."""

    def read(folder: Path) -> None:
        given = (f"train={only(folder)}", f"validation={only(folder)}")
        attempt_all(*(partial(task.from_data, given, task.options_class()) for task in tasks))

    return read


def _both(name: str, valid: list[Any]) -> SearchStrategy[Case]:
    """Rows as JSON lines and as an array."""
    return one_file(f"{name}.jsonl", changed_json_lines(valid)) | one_file(f"{name}.json", changed_json(valid))


# Saved data sets


@cache
def _saved(*, with_splits: bool) -> dict[str, bytes]:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"]), "id": datasets.Value("int8")}
    )
    rows = [{"text": row["text"], "label": row["label"], "id": row["id"]} for row in ROWS]
    dataset: Any = datasets.Dataset.from_list(rows, features)
    if with_splits:
        dataset = datasets.DatasetDict({"train": dataset, "validation": dataset})
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        dataset.save_to_disk(folder)
        return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def _saved_data_set(with_splits: bool) -> SearchStrategy[Case]:
    files = _saved(with_splits=with_splits)
    values = {name: json.loads(content) for name, content in files.items() if name.endswith(".json")}
    return folder_with_errors(files, values)


def _read_saved(folder: Path) -> None:
    rows = read_splits([str(folder)]) if (folder / "dataset_dict.json").is_file() else read_table(folder)
    del rows
    for file in find_inputs([str(folder)]).files:
        read_documents(Path(file))


def labelled_readers() -> dict[str, Reader]:
    """The readers of this module, by the names of what they read."""
    spans = [_both("spans", values) for values in (SPANS, WORDS, LABEL_STUDIO)]
    return {
        "saved data sets": Reader(st.deferred(lambda: _saved_data_set(True) | _saved_data_set(False)), _read_saved),
        "SQuAD": Reader(
            one_file("train.json", changed_json(QUESTIONS) | any_bytes()) | _both("train", QUESTION_ROWS),
            _task(QuestionAnswering),
        ),
        "CoNLL": Reader(one_file("train.conll", changed_bytes(CONLL) | any_bytes()), _task(TokenClassification)),
        "CoNLL-U": Reader(one_file("train.conllu", changed_bytes(CONLLU)), _task(TokenClassification)),
        "tagged texts": Reader(st.one_of(spans), _task(TokenClassification)),
        "labelled texts": Reader(_both("train", LABELLED), _task(Classification, Regression, MultiLabelClassification)),
    }
