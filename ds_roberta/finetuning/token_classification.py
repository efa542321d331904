"""Token classification: a tag for each word, which may mark entities."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional

from ds_roberta.distributed import logger
from ds_roberta.errors import UserError, unknown_key_message
from ds_roberta.finetuning.entities import (
    entity_metrics,
    make_word_windows,
    tag_metrics,
    token_labels,
    word_logits,
)
from ds_roberta.finetuning.examples import Columns
from ds_roberta.finetuning.labelled_tables import read_splits, read_table
from ds_roberta.finetuning.tagged_sentences import Sentence, are_of_entities, read_conll, table_sentences, tag_names
from ds_roberta.finetuning.task import NO_LABEL, Encoded, Task, label_head

TABLES = (".jsonl", ".parquet")
COLUMN_FILES = (".conll", ".bio", ".iob", ".iob2", ".tsv", ".txt")


def token_classification(data: tuple[str, ...], columns: Columns) -> Task:
    """
    Raises:
        UserError: as `read_splits`, `parse_conll` and `table_sentences`, or a type of entities, or a tag that marks
            none, is not in the training sentences.
    """
    splits = read_splits(
        data,
        suffixes=(*COLUMN_FILES, *TABLES),
        read=partial(read_sentences, columns=columns),
        of_table=lambda table: table_sentences(table, columns.text, columns.label),
    )
    names = tag_names(splits["train"])
    if len(names) < 2:
        raise UserError(
            f"the training sentences have only the tag {names[0]!r}: token classification needs two at least"
        )
    of_entities = are_of_entities(names)
    for split, sentences in splits.items():
        _check_tags(split, sentences, names)
    return Task(
        model=transformers.RobertaForTokenClassification,
        head=label_head(names),
        splits=splits,
        encode=partial(_encode, names=names, measure=entity_metrics if of_entities else tag_metrics),
        loss=batch_loss,
        collator=transformers.DataCollatorForTokenClassification,
        metrics=("f1", "precision", "recall", "accuracy") if of_entities else ("accuracy", "macro_f1"),
        add_prefix_space=True,  # so that whole texts begin with a word as in fine-tuning
        results={"label_names": names},
    )


def _check_tags(split: str, sentences: list[Sentence], names: list[str]) -> None:
    """Refuse a tag or an entity type that is not in training, which is another labelling; of a known type an unseen
    tag, such as I- where all training entities are of one word, is missed and told."""
    of_entities = are_of_entities(names)
    kind = "entity type" if of_entities else "tag"
    types = {name.partition("-")[2] for name in names} if of_entities else set(names)
    unseen: dict[str, str] = {}
    for sentence in sentences:
        for tag in set(sentence.tags).difference(names):
            unseen.setdefault(tag, sentence.place)
            type_ = tag.partition("-")[2] if of_entities else tag
            if type_ not in types:
                problem = unknown_key_message(kind, type_, types - {""})
                raise UserError(
                    f"{sentence.place}: {problem}; no training sentence has it: mend its tags or remove the sentence"
                )
    if unseen:
        tags = ", ".join(f"{tag} ({unseen[tag]})" for tag in sorted(unseen))
        logger.warning(f"{split} has tags that no training sentence has: {tags}; the model will miss them")


def read_sentences(path: Path, columns: Columns) -> list[Sentence]:
    """Rows of lists from `.jsonl` and `.parquet`, CoNLL's columns from other files."""
    if path.suffix in TABLES:
        return table_sentences(read_table(path), columns.text, columns.label)
    return read_conll(path)


def batch_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """The labelled words' summed cross entropy over their number in the whole batch, all its micro-batches together.

    Args:
        outputs: with `logits`, (B, T, tags).
        labels: (B, T), int64, -100 where there is no label.
        num_items_in_batch: None stands for these sequences alone.
    """
    loss = functional.cross_entropy(
        outputs["logits"].float().flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="sum"
    )
    return loss / (labels.ne(NO_LABEL).sum() if num_items_in_batch is None else num_items_in_batch)


def _encode(
    tokenizer: transformers.PreTrainedTokenizerBase,
    sentences: list[Sentence],
    max_seq_length: int,
    names: list[str],
    measure: Callable[[list[list[str]], list[list[str]]], dict[str, Any]],
) -> Encoded:
    windows = make_word_windows(tokenizer, sentences, max_seq_length)
    features = [
        {
            "input_ids": window.input_ids,
            "attention_mask": [1] * len(window.input_ids),
            "labels": token_labels(window, sentences[window.sentence], names),
        }
        for window in windows
    ]
    gold = [list(sentence.tags) for sentence in sentences]

    def measure_logits(logits: Any) -> dict[str, Any]:
        of_sentences = word_logits(windows, logits, len(sentences))
        return measure(gold, [[names[tag] for tag in found.argmax(-1)] for found in of_sentences])

    return Encoded(features, len(sentences), measure_logits)
