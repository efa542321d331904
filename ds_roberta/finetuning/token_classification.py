"""Token classification: a tag for each word, which may mark entities.

Words with tags become token ids in windows over their sentences, with a label at each word's first subword; the
windows' logits become one row per word again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional

from ds_roberta.errors import UserError, unknown_key_message
from ds_roberta.finetuning.conllu import UPOS, has_tags, is_conllu, parse_conllu
from ds_roberta.finetuning.entity_spans import has_spans, is_unannotated, span_sentences, without_tasks
from ds_roberta.finetuning.error_analysis import tag_errors
from ds_roberta.finetuning.labelled_tables import SUFFIXES, Columns, find_texts, read_splits
from ds_roberta.finetuning.tag_metrics import Entity, entity_metrics, find_entities, tag_metrics
from ds_roberta.finetuning.tagged_sentences import (
    ENTITY_TAG,
    OUTSIDE,
    TAG_COLUMNS,
    WORD_COLUMNS,
    Sentence,
    are_of_entities,
    check_scheme,
    has_header,
    parse_conll,
    split_columns,
    split_text,
    table_sentences,
    tag_names,
)
from ds_roberta.finetuning.task import (
    COMMAND_LINE,
    NO_LABEL,
    Answer,
    Encoded,
    Task,
    label_head,
    label_names,
    one_line,
    softmax,
)
from ds_roberta.inputs.streams import suffix_of
from ds_roberta.inputs.tables import Table, read_table, read_text
from ds_roberta.options import option
from ds_roberta.process import logger

COLUMN_FILES = (".conll", ".conllu", ".bio", ".iob", ".iob2", ".tsv", ".txt")
TABLES = tuple(suffix for suffix in SUFFIXES if suffix not in COLUMN_FILES)


@dataclass(frozen=True)
class TagColumns(Columns):
    """Token classification."""

    conllu_column: str = option("in CoNLL-U, the column of the tags: UPOS, XPOS or a key in MISC, such as NER", UPOS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_pair_column is not None:
            column = self.text_pair_column
            raise UserError(f"--text_pair_column {column} does nothing with --task token-classification: leave it out")


@dataclass(frozen=True)
class WordWindow:
    """A piece of a sentence: `<s> piece </s>`.

    Attributes:
        sentence: the sentence's index.
        words: indices of the words that are labelled here; each word is labelled in exactly one window.
        positions: position of each such word's first subword in `input_ids`.
    """

    sentence: int
    input_ids: list[int]
    words: list[int]
    positions: list[int]


class TokenClassification(Task):
    """Predicts a tag for each word, one of `names`."""

    name = "token-classification"
    architecture = "RobertaForTokenClassification"
    options_class = TagColumns
    collator = transformers.DataCollatorForTokenClassification
    add_prefix_space = True  # so that whole texts begin with a word as in fine-tuning

    def __init__(self, names: list[str], options: TagColumns):
        self.names, self.options = names, options
        self.of_entities = are_of_entities(names)
        self.head = label_head(names)
        self.results = {"label_names": names}
        self.metric_names = ("f1", "precision", "recall", "accuracy") if self.of_entities else ("accuracy", "macro_f1")

    @classmethod
    def from_data(
        cls, data: tuple[str, ...], options: TagColumns
    ) -> tuple[TokenClassification, dict[str, Sequence[Sentence]]]:
        """
        Raises:
            UserError: as `read_splits`, `read_sentences` and `check_scheme`, or a type of entities, or a tag that marks
                none, is not in the training sentences.
        """
        splits = read_splits(
            data,
            (*COLUMN_FILES, *TABLES),
            partial(read_sentences, options=options),
            validation_fraction=options.validation_fraction,
            labels=lambda sentences: [set(sentence.tags) for sentence in sentences],
            groups=lambda sentences: [sentence.located()[0] for sentence in sentences],  # a text may be annotated twice
            is_unlabelled=partial(is_untagged, options=options),
        )
        names = tag_names(splits["train"])
        if len(names) < 2:
            raise UserError(
                f"the training sentences have only the tag {names[0]!r}: token classification needs at least two"
            )
        for split, sentences in splits.items():
            _check_tags(split, sentences, names)
        if are_of_entities(names):
            check_scheme((each.place, tag) for each in chain(splits["train"], *splits.values()) for tag in each.tags)
        return cls(names, options), splits

    @classmethod
    def from_model(
        cls, config: transformers.RobertaConfig, results: dict[str, Any], given: dict[str, Any]
    ) -> TokenClassification:
        return cls(label_names(config), TagColumns(**given))

    def read_inputs(self, path: str) -> list[Sentence]:
        return read_sentences(path, self.options, labelled=False, names=self.names)

    def other_columns(self, given: Sentence) -> dict[str, Any]:
        return given.others

    def make_input(self, text: str, text_pair: str | None) -> Sentence:
        return split_text(COMMAND_LINE, text)

    def encode(
        self, tokenizer: transformers.PreTrainedTokenizerBase, inputs: Sequence[Sentence], max_seq_length: int
    ) -> Encoded:
        windows = make_word_windows(tokenizer, inputs, max_seq_length)
        features = [
            {"input_ids": window.input_ids, "attention_mask": [1] * len(window.input_ids)} for window in windows
        ]
        if inputs[0].tags:
            for feature, window in zip(features, windows, strict=True):
                feature["labels"] = token_labels(window, inputs[window.sentence], self.names)
        return Encoded(inputs, features, windows)

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """
        Args:
            outputs: with `logits`, (B, T, tags).
            labels: (B, T), int64, -100 at tokens without a label.
        """
        loss = functional.cross_entropy(
            outputs["logits"].float().flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="sum"
        )
        count = torch.as_tensor(labels.ne(NO_LABEL).sum() if num_items_in_batch is None else num_items_in_batch)
        return loss / count.clamp(min=1)  # of no label if all of a batch's tags are unknown

    def metrics(self, encoded: Encoded, logits: Any) -> dict[str, Any]:
        measure = entity_metrics if self.of_entities else tag_metrics
        of_sentences = word_logits(encoded.windows, logits, len(encoded.inputs))
        return measure(
            [list(sentence.tags) for sentence in encoded.inputs],
            [[self.names[tag] for tag in found.argmax(-1)] for found in of_sentences],
        )

    def error_analysis(self, encoded: Encoded, logits: Any) -> dict[str, Any]:
        """Words by type of entity, or by tag; see `tag_errors`."""
        kinds = {tag: (tag.partition("-")[2] or tag) if self.of_entities else tag for tag in self.names}
        return tag_errors(encoded.inputs, word_logits(encoded.windows, logits, len(encoded.inputs)), kinds)

    def answer(self, encoded: Encoded, logits: Any) -> list[Answer]:
        """Entities with their texts and places, or each word's tag with its score if the model's tags do not mark
        entities. `start` and `end` are characters of the row's `text`: words without a text are joined by spaces."""
        answers = []
        of_sentences = word_logits(encoded.windows, logits, len(encoded.inputs))
        for sentence, of_words in zip(encoded.inputs, of_sentences, strict=True):
            tags = [self.names[index] for index in of_words.argmax(-1)]
            scores = softmax(of_words).max(-1)
            text, offsets = sentence.located()
            if self.of_entities:
                entities = [_entity(sentence, entity) for entity in find_entities(tags, scores)]
                lines = [f"  {each['type']}: {each['text']!r} {_place(each)} {each['score']:.4f}" for each in entities]
                found: dict[str, Any] = {"entities": entities}
            else:
                lines = ["  " + " ".join(f"{word}/{tag}" for word, tag in zip(sentence.words, tags, strict=True))]
                found = {"scores": scores.tolist()}
            starts, ends = zip(*offsets, strict=True) if offsets else ((), ())
            row = {"text": text, "words": sentence.words, "start": starts, "end": ends, "tags": tags, **found}
            answers.append(Answer([one_line(text), *(lines or ["  no entities"])], row))
        return answers


def read_sentences(
    source: str | Path | Table, options: TagColumns, *, labelled: bool = True, names: Collection[str] = ()
) -> list[Sentence]:
    """Rows of lists or of spans from tables, columns of CoNLL or CoNLL-U from files with `COLUMN_FILES`' endings.

    Args:
        labelled: whether words must have tags. If not, rows may also have texts instead of lists of words, and a `.tsv`
            is a table if its first line names a column of texts.
        names: the model's tags, if not `labelled`; see `parse_conll`.

    Raises:
        UserError: as `parse_conll`, `parse_conllu`, `table_sentences` or `span_sentences`, or an option is for other
            files.
    """
    if not isinstance(source, Table) and (suffix := suffix_of(str(source))) in COLUMN_FILES:
        text = read_text(source)
        if labelled or suffix != ".tsv" or not has_header(text, options.text_column, names):
            return _read_columns(str(source), text, options, labelled, names)
    table, columns = without_tasks(read_table(source), options, labelled=labelled)
    _check_conllu_column(table.name, options)
    if not _has_words(table, columns):
        if not labelled:
            texts = find_texts(table, columns, pairs=False)
            return [replace(split_text(each.place, each.text, or_none=True), others=each.others) for each in texts]
        if has_spans(table, columns):
            return span_sentences(table, columns)
    return table_sentences(table, columns.text_column, columns.label_column, labelled=labelled)


def is_untagged(source: str | Path | Table, options: TagColumns) -> bool:
    """Whether a file has only words, or its columns of tags or spans are missing or empty.

    Raises:
        UserError: the file cannot be read.
    """
    if not isinstance(source, Table) and suffix_of(str(source)) in COLUMN_FILES:
        text = read_text(source)
        if is_conllu(text):
            return not has_tags(text, options.conllu_column)
        return all(len(split_columns(line)) < 2 for line in text.split("\n") if not line.startswith("#"))
    table = read_table(source)
    if not _has_words(table, options):
        return is_unannotated(table, options)
    names = TAG_COLUMNS if options.label_column is None else (options.label_column,)
    tags = (row.get(name) for row in table.rows for name in names)
    return all(value is None or (isinstance(value, list) and not any(map(_is_given, value))) for value in tags)


def _is_given(tag: Any) -> bool:
    return tag is not None and tag != ""


def _has_words(table: Table, columns: Columns) -> bool:
    """Whether a column has lists of words."""
    words = columns.text_column or next((name for name in WORD_COLUMNS if name in table.columns), None)
    return words is not None and any(isinstance(row.get(words), list) for row in table.rows)


def _read_columns(name: str, text: str, options: TagColumns, labelled: bool, names: Collection[str]) -> list[Sentence]:
    given = "text" if options.text_column is not None else "label" if options.label_column is not None else None
    if given is not None:
        raise UserError(f"{name!r} has no names of columns, so --{given}_column does nothing: leave it out")
    if is_conllu(text):
        return parse_conllu(name, text, options.conllu_column, labelled=labelled)
    _check_conllu_column(name, options)
    return parse_conll(name, text, labelled=labelled, names=names)


def _check_conllu_column(name: str, options: TagColumns) -> None:
    if options.conllu_column != UPOS:
        raise UserError(f"{name!r} is not CoNLL-U, so --conllu_column does nothing: leave it out")


def _check_tags(split: str, sentences: list[Sentence], names: list[str]) -> None:
    """Refuse a tag or entity type that is not in training, as it belongs to another labelling; only warn of a new tag
    of a known type, such as I- if all training entities have one word: it cannot be predicted."""
    of_entities = are_of_entities(names)
    kind = "entity type" if of_entities else "tag"
    types = {name.partition("-")[2] for name in names if name != OUTSIDE} if of_entities else set(names)
    unseen: dict[str, str] = {}
    for sentence in sentences:
        for tag in set(sentence.tags).difference(names):
            unseen.setdefault(tag, sentence.place)
            if of_entities and (not ENTITY_TAG.fullmatch(tag) or ("-" not in tag and "" not in types)):
                raise UserError(
                    f"{sentence.place}: the tag {tag!r} is neither O nor like {names[-1]} in training: fix its tags or "
                    "remove the sentence"
                )
            type_ = tag.partition("-")[2] if of_entities else tag
            if type_ not in types:
                problem = unknown_key_message(kind, type_, types - {""})
                raise UserError(
                    f"{sentence.place}: {problem}; no training sentence has it: fix its tags or remove the sentence"
                )
    if unseen:
        tags = ", ".join(f"{tag} ({unseen[tag]})" for tag in sorted(unseen))
        logger.warning(f"{split} has tags that no training sentence has: {tags}; the model will miss them")


def make_word_windows(
    tokenizer: transformers.PreTrainedTokenizerBase, sentences: Sequence[Sentence], max_seq_length: int
) -> list[WordWindow]:
    """Windows over each sentence, in order. Every word is encoded with a space before it, as RoBERTa's tokenizer does
    with `add_prefix_space`; the end of a word that is longer than a window is cut off. A word of which the tokenizer's
    normalizer leaves nothing is `<unk>`."""
    room = max_seq_length - 2
    distinct = sorted({word for sentence in sentences for word in sentence.words})
    options = {"add_special_tokens": False, "return_attention_mask": False, "split_special_tokens": True}
    words = [f" {word}" for word in distinct]
    encoded = tokenizer(words, **options, verbose=False)["input_ids"] if words else []  # which it cannot take
    ids = {word: word_ids[:room] or [tokenizer.unk_token_id] for word, word_ids in zip(distinct, encoded, strict=True)}
    windows = []
    for index, sentence in enumerate(sentences):
        lengths = [len(ids[word]) for word in sentence.words]
        for start, end, first, last in word_spans(lengths, room):
            input_ids = [tokenizer.bos_token_id]
            positions = []
            for number in range(start, end):
                if first <= number < last:
                    positions.append(len(input_ids))
                input_ids += ids[sentence.words[number]]
            windows.append(WordWindow(index, [*input_ids, tokenizer.eos_token_id], list(range(first, last)), positions))
    return windows


def word_spans(lengths: Sequence[int], room: int) -> Iterator[tuple[int, int, int, int]]:
    """Windows of at most `room` tokens over words of these lengths, each at most `room`; they overlap by up to half.

    Yields:
        start, end of the words in the window, and first, last (exclusive) of those that it labels: of the words that
        two windows share, each labels half, so that every word has words on both sides.
    """
    start = first = 0
    while True:
        end, tokens = start, 0
        while end < len(lengths) and (end == start or tokens + lengths[end] <= room):
            tokens += lengths[end]
            end += 1
        if end == len(lengths):
            yield start, end, first, end
            return
        following, shared = end, 0
        most = min(room // 2, room - lengths[end])  # the next window holds one more word at least
        while following - 1 > start and shared + lengths[following - 1] <= most:
            following -= 1
            shared += lengths[following]
        last = (following + end + 1) // 2
        yield start, end, first, last
        start, first = following, last


def token_labels(window: WordWindow, sentence: Sentence, names: Sequence[str]) -> list[int]:
    """A label for each token: the tag's index at a labelled word's first subword, else -100, as for a tag that no
    training sentence has."""
    indices = {name: index for index, name in enumerate(names)}
    labels = [NO_LABEL] * len(window.input_ids)
    for word, position in zip(window.words, window.positions, strict=True):
        labels[position] = indices.get(sentence.tags[word], NO_LABEL)
    return labels


def word_logits(windows: Sequence[WordWindow], logits: Sequence[np.ndarray], sentences: int) -> list[np.ndarray]:
    """Each sentence's logits, (words, tags), from its windows', each (T, tags)."""
    found: list[list[np.ndarray]] = [[] for _ in range(sentences)]
    for window, of_window in zip(windows, logits, strict=True):
        found[window.sentence].append(of_window[window.positions])
    return [np.concatenate(pieces) for pieces in found]


def _entity(sentence: Sentence, entity: Entity) -> dict[str, Any]:
    text, offsets = sentence.located()
    start, end = offsets[entity.start][0], offsets[entity.end - 1][1]
    words = {} if sentence.text is not None else {"start_word": entity.start, "end_word": entity.end}
    return {"text": text[start:end], "start": start, "end": end, **words, "type": entity.type, "score": entity.score}


def _place(entity: dict[str, Any]) -> str:
    if "start_word" in entity:
        return f"(words {entity['start_word']} to {entity['end_word']})"
    return f"(characters {entity['start']} to {entity['end']})"
