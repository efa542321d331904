"""Extractive question answering: the span of a context that answers a question, or none."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional

from ds_roberta.distributed import logger
from ds_roberta.finetuning.labelled_tables import read_splits, read_table
from ds_roberta.finetuning.spans import SpanOptions, cut_questions, decode_all, make_windows, span_labels
from ds_roberta.finetuning.squad import Question, QuestionSet, read_squad, table_questions
from ds_roberta.finetuning.squad_metrics import squad_v1_metrics, squad_v2_metrics
from ds_roberta.finetuning.task import Encoded, Task

TABLES = (".jsonl", ".parquet")


def question_answering(data: tuple[str, ...], options: SpanOptions) -> Task:
    """
    Raises:
        UserError: as `read_splits`, `read_squad` and `table_questions`.
    """
    splits = read_splits(data, suffixes=(".json", *TABLES), read=read_questions, of_table=table_questions)
    with_null = any(questions.may_be_unanswerable for questions in splits.values())
    return Task(
        model=transformers.RobertaForQuestionAnswering,
        head={},
        splits=splits,
        encode=partial(_encode, options=options, with_null=with_null),
        loss=batch_loss,
        collator=transformers.DataCollatorWithPadding,
        metrics=("f1", "exact", "best_f1", "best_exact") if with_null else ("f1", "exact_match"),
        results={"question_answering": {"may_be_unanswerable": with_null, "options": asdict(options)}},
    )


def read_questions(path: Path, *, labelled: bool = True) -> QuestionSet:
    """SQuAD's JSON from `.json`, rows from `.jsonl` and `.parquet`.

    Raises:
        UserError: as `read_squad`, `read_table` and `table_questions`.
    """
    if path.suffix == ".json":
        return read_squad(path, labelled=labelled)
    return table_questions(read_table(path), labelled=labelled)


def batch_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """The summed cross entropy of beginnings and ends over their number in the whole batch, all its micro-batches
    together.

    Args:
        outputs: with `start_logits` and `end_logits`, (B, T).
        labels: (B, 2), int64: the positions of an answer's first and last token.
        num_items_in_batch: the number of labels, two a sequence; None stands for these sequences alone.
    """
    logits = torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1).float()
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


def _encode(
    tokenizer: transformers.PreTrainedTokenizerBase,
    question_set: QuestionSet,
    max_seq_length: int,
    options: SpanOptions,
    with_null: bool,
) -> Encoded:
    questions: list[Question] = question_set.questions
    cut = cut_questions(tokenizer, questions, max_seq_length)
    if cut:
        logger.warning(f"{len(cut)} of {len(questions)} questions are cut as too long, first {questions[cut[0]].place}")
    windows = make_windows(tokenizer, questions, max_seq_length, options.doc_stride)
    features = [
        {
            "input_ids": window.input_ids,
            "attention_mask": [1] * len(window.input_ids),
            "labels": span_labels(window, questions[window.question]),
        }
        for window in windows
    ]
    golds = [question.answers for question in questions]

    def measure(logits: Any) -> dict[str, Any]:
        start_logits, end_logits = logits
        decoded = decode_all(windows, start_logits, end_logits, len(questions), options)
        answers = [
            question.context[found.spans[0].start : found.spans[0].end] if found.spans else ""
            for question, found in zip(questions, decoded, strict=True)
        ]
        if not with_null:
            return squad_v1_metrics(golds, answers)
        null_probabilities = [found.null_probability for found in decoded]
        return squad_v2_metrics(golds, answers, null_probabilities, options.no_answer_threshold)

    return Encoded(features, len(questions), measure)
