"""Labelled texts: the splits that `--data` names, and the columns of their tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ds_roberta.errors import UserError
from ds_roberta.inputs.streams import is_url, suffix_of
from ds_roberta.inputs.tables import TABULAR, Table, is_saved_splits, read_saved_splits, read_table
from ds_roberta.options import Settings, option, require_open_share
from ds_roberta.process import logger

SPLIT_PREFIXES = {  # of file names, before another kind of character than a letter; the first that matches counts
    "train": ("training", "train"),
    "validation_mismatched": ("validation_mismatched", "valid_mismatched", "dev_mismatched"),  # MNLI has two
    "test_mismatched": ("test_mismatched",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
SUFFIXES = tuple(f".{kind}" for kind in TABULAR)
TextColumns = tuple[str, str | None]
"""The columns of a text, or of the two texts of a pair."""
TEXT_COLUMNS: tuple[TextColumns, ...] = (  # of GLUE's files and of its data sets on the web
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("#1 String", "#2 String"),
    ("text", "text_pair"),
    ("sentence", None),
    ("text", None),
)
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})")
"""The name of one of several files of a split, as `datasets` and the hub have them."""
_NUMBERING = "0123456789_-() "


@dataclass(frozen=True)
class Splitting(Settings):
    """Which examples are for what."""

    validation_fraction: float | None = option(
        "take this share of the training examples for validation, where --data has none: always the same ones, with "
        "the same shares of labels; questions about one context stay together",
        None,
        check=require_open_share,
    )


@dataclass(frozen=True)
class Columns(Splitting):
    """Names of table columns."""

    text_column: str | None = option(
        "column of the text (default: in predictions that of fine-tuning, else sentence, text, tokens, or the first "
        "of a pair such as sentence1)",
        None,
    )
    text_pair_column: str | None = option(
        "column of the second text of a pair (default: as for --text_column, if the table has one)", None
    )
    label_column: str | None = option(
        "column of the label (default: label, labels, tags, or GLUE's names for it)", None
    )


@dataclass(frozen=True)
class Text:
    """A text, or a pair of texts.

    Attributes:
        place: the row in its file, for messages.
        pair: the second text of a pair.
        label: the index of a class, a number in regression, or a 1 or 0 for each of several labels; None: there is
            none.
        others: the row's other columns.
    """

    place: str = field(compare=False, repr=False)
    text: str
    pair: str | None = None
    label: float | tuple[float, ...] | None = None
    others: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


def read_splits(
    data: Iterable[str],
    suffixes: Sequence[str] = SUFFIXES,
    read: Callable[[str | Table], Any] | None = None,
    *,
    validation_fraction: float | None = None,
    labels: Callable[[Any], Sequence[Collection[str]]] | None = None,
    groups: Callable[[Any], Sequence[Any]] | None = None,
    is_unlabelled: Callable[[str | Table], bool] | None = None,
) -> dict[str, Any]:
    """The content of `train`, `validation` and any other splits of `SPLIT_PREFIXES`.

    Args:
        data: one folder with files for each split, or saved by `datasets`, or a data set of its hub; or files, each
            named after its split (`dev.tsv`) or given as `validation=FILE`.
        suffixes: the endings of the files to read in a folder.
        read: reads a file, or converts a table; None: as tables.
        validation_fraction: take this share of `train` as `validation`.
        labels: gives those of each training example, for `validation_examples`; None: they have none.
        groups: gives that of each training example; None: each is its own.
        is_unlabelled: whether nothing in a file or a table has a label; test splits of only such ones are left out.

    Raises:
        UserError: a split is missing or given twice, or a file cannot be read.
    """
    given = list(data)
    found = _find_splits(given, suffixes)
    if "train" not in found or (validation_fraction is None and "validation" not in found):
        missing = "validation" if "train" in found else "train"
        option = "" if missing == "train" else ", or take some of the training examples with --validation_fraction 0.1"
        only = f", only {' and '.join(sorted(found))}" if found else ""
        raise UserError(
            f"no {missing} file in --data {' '.join(given)}{only}: name a file {SPLIT_PREFIXES[missing][-1]} with the "
            f"ending {', '.join(suffixes)}, or give {missing}=FILE{option}"
        )
    if validation_fraction is not None and "validation" in found:
        raise UserError("--validation_fraction is given, but --data has a validation split: leave one of them out")
    if is_unlabelled is not None:
        found = {
            split: sources
            for split, sources in found.items()
            if not (split.startswith("test") and _are_left_out(sources, is_unlabelled))
        }
    splits = {split: _read_parts(sources, read or read_table) for split, sources in found.items()}
    if validation_fraction is not None:
        train = splits["train"]
        examples = train.rows if isinstance(train, Table) else train
        chosen = validation_examples(
            [()] * len(examples) if labels is None else labels(train),
            range(len(examples)) if groups is None else groups(train),
            validation_fraction,
        )
        if not 0 < len(chosen) < len(examples):
            raise UserError(
                f"--validation_fraction {validation_fraction:g} of {len(examples)} examples leaves one split without "
                "any: choose another, or give a validation file"
            )
        others = sorted(set(range(len(examples))) - set(chosen))
        splits["validation"], splits["train"] = (_select(train, indices) for indices in (chosen, others))
        logger.info(
            f"{len(chosen):,} of {len(examples):,} training examples are taken for validation "
            f"(--validation_fraction {validation_fraction:g})"
        )
    return splits


def validation_examples(labels: Sequence[Collection[str]], groups: Sequence[Any], fraction: float) -> list[int]:
    """Indices of a fixed random share of the examples, sorted.

    Args:
        labels: of each example: each set of labels has the same share, within one example, and no label is left without
            a training example.
        groups: of each example; those of one group are chosen or left together.
    """
    units = dict[Any, list[int]]()
    for index, group in enumerate(groups):
        units.setdefault(group, []).append(index)
    indices = list(units.values())
    random = np.random.default_rng(0)
    order = random.permutation(len(indices)).tolist()
    order.sort(key=lambda unit: sorted({label for index in indices[unit] for label in labels[index]}))  # random within
    count = max(1, round(fraction * len(order)))
    places = ((np.arange(count) + random.random()) * len(order) / count).astype(int)  # evenly over all sets of labels
    chosen = {order[place] for place in places}
    learned = {label for unit in set(order) - chosen for index in indices[unit] for label in labels[index]}
    found = []
    for unit in sorted(chosen):
        of_unit = {label for index in indices[unit] for label in labels[index]}
        if of_unit <= learned:
            found += indices[unit]
        learned |= of_unit  # otherwise it stays in training
    return sorted(found)


def find_texts(table: Table, columns: Columns, *, pairs: bool = True) -> list[Text]:
    """The table's texts, or its pairs of texts, without labels.

    Args:
        pairs: whether the task takes pairs; if not, the second text is a column like others.

    Raises:
        UserError: a column is missing, or a row has no text.
    """
    text, second = text_columns(table, columns)
    pair = second if pairs else None
    firsts = _texts(table, text)
    seconds = [None] * len(firsts) if pair is None else _texts(table, pair)
    return [
        Text(table.place(index), *texts, others=without(table.rows[index], text, pair))
        for index, texts in enumerate(zip(firsts, seconds, strict=True))
    ]


def text_columns(table: Table, columns: Columns) -> TextColumns:
    """The columns that `find_texts` reads: those that are named, or the usual ones.

    Raises:
        UserError: no column is named, and the table has none of the usual ones.
    """
    if columns.text_column is not None:
        return columns.text_column, columns.text_pair_column
    usual = (names for names in TEXT_COLUMNS if all(name in table.columns for name in names if name))
    text, pair = next(usual, (None, None))
    if text is None:
        raise UserError(f"{table.name} has the columns {listed(table)}: give the one with the text as --text_column")
    return text, columns.text_pair_column or pair


def training_columns(splits: Mapping[str, Table], columns: Columns) -> TextColumns:
    """The columns of the texts in `train`.

    Raises:
        UserError: some splits have pairs, and others single texts.
    """
    found = {split: text_columns(table, columns) for split, table in splits.items()}
    train = found["train"]
    for split, names in found.items():
        if (names[1] is None) != (train[1] is None):
            raise UserError(
                f"{splits['train'].name} has {_described(train)}, but {splits[split].name} has {_described(names)}: "
                "name the columns of all splits by --text_column and, for pairs, --text_pair_column"
            )
    return train


def with_kept_columns(table: Table, columns: Columns, kept: TextColumns | None) -> Columns:
    """Named columns, or else those of fine-tuning if the table has them.

    Args:
        kept: None: they are unknown.
    """
    if kept is None:
        return columns
    text, pair = columns.text_column or kept[0], columns.text_pair_column or kept[1]
    if not all(name in table.columns for name in (text, pair) if name is not None):
        return columns
    return replace(columns, text_column=text, text_pair_column=pair)


def without(row: Mapping[str, Any], *columns: str | None) -> dict[str, Any]:
    """A row without these columns."""
    return {name: value for name, value in row.items() if name not in columns}


def check_column(table: Table, column: str, option: str) -> None:
    """Raise `UserError` unless the table has the column."""
    if column not in table.columns:
        raise UserError(f"{table.name} has no column {column!r}: give one of {listed(table)} as {option}")


def listed(table: Table) -> str:
    """The columns of a table, for messages."""
    return ", ".join(map(repr, table.columns))


def _described(names: TextColumns) -> str:
    kind = "single texts" if names[1] is None else "pairs of texts"
    return f"{kind} ({', '.join(repr(name) for name in names if name is not None)})"


def _texts(table: Table, column: str) -> list[str]:
    check_column(table, column, "--text_column or --text_pair_column")
    texts = [row.get(column) for row in table.rows]
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{table.place(index)}: {column!r} is {text!r}, not a text: fix or remove the row")
    if empty := [index for index, text in enumerate(texts) if not str(text).strip()]:
        first = table.place(empty[0])
        logger.warning(f"{len(empty):,} of {len(texts):,} texts in {column!r} are empty, first {first}")
    return texts  # type: ignore[return-value]


def _split_of(name: str) -> str | None:
    for split, prefixes in SPLIT_PREFIXES.items():
        if re.match(rf"({'|'.join(prefixes)})(?![a-z])", name.lower()):
            return split
    return None


def split_entry(entry: str) -> tuple[str | None, str]:
    """The split that an entry of `--data` names, as in `validation=FILE`, and the path."""
    name, equals, rest = entry.partition("=")
    return (name, rest) if equals and name in SPLIT_PREFIXES else (None, entry)


def _find_splits(given: Sequence[str], suffixes: Sequence[str]) -> Mapping[str, Sequence[str | Table]]:
    for entry in given:
        if not is_url(path := split_entry(entry)[1]) and not Path(path).exists():
            raise UserError(f"--data {path!r} does not exist: choose a folder or files that do")
    if len(given) == 1 and is_saved_splits(given[0]):
        return _of_tables(given[0], read_saved_splits(given[0]))
    if len(given) == 1 and (folder := Path(given[0])).is_dir():
        try:
            files = sorted(folder.iterdir())
        except OSError as error:
            raise UserError(f"cannot read --data {str(folder)!r} ({error.strerror}): choose another folder") from error
        return _by_split(_of_splits([file for file in files if suffix_of(file.name) in suffixes]))
    return _by_split(given)


def _of_splits(files: Sequence[Path]) -> list[str]:
    """The files of a folder that hold a split. Beside `train.csv`, `train_metadata.json` holds none; whether
    `train_2.csv` does is unclear, so it stays among them."""
    split_of = {file: split for file in files if (split := _split_of(file.name))}
    whole = {split for file, split in split_of.items() if _is_named_after(split, file)}
    found = []
    for file, split in split_of.items():
        if split in whole and not _is_named_after(split, file) and not _PART.match(file.name):
            logger.info(f"{file} is left out: another file is named {split} and nothing else")
        else:
            found.append(str(file))
    return found


def _is_named_after(split: str, file: Path) -> bool:
    """Whether a name has nothing but that of the split, its ending, and perhaps a number."""
    return file.name.lower().split(".")[0].rstrip(_NUMBERING) in SPLIT_PREFIXES[split]


def _of_tables(name: str, tables: Mapping[str, Table]) -> dict[str, Sequence[Table]]:
    found: dict[str, Sequence[Table]] = {}
    for own_name, table in tables.items():
        split = _split_of(own_name)
        if split in found:
            raise UserError(f"{name!r} has two splits for {split}, one of them {own_name!r}: save it with only one")
        if split is not None:
            found[split] = [table]
    return found


def _by_split(entries: Iterable[str]) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for entry in entries:
        split, file = split_entry(entry)
        split = split or _split_of(Path(file).name)
        if split is None:
            raise UserError(f"{entry!r} does not name its split: give it as train=, validation= or test={entry}")
        files.setdefault(split, []).append(file)
    for split, of_split in files.items():
        _check_parts(split, of_split)
    return files


def _check_parts(split: str, files: Sequence[str]) -> None:
    """Raise `UserError` unless there is one file, or the parts of one, all of them."""
    parts = [_PART.match(Path(file).name) for file in files]
    if len({part and (part[1], part[3]) for part in parts}) > 1 or (len(files) > 1 and parts[0] is None):
        raise UserError(f"{files[0]!r} and {files[-1]!r} are both {split}: leave one of them out of --data")
    if parts[0] is None:
        return
    count, numbers = int(parts[0][3]), [int(part[2]) for part in parts if part]
    if twice := next((file for file, number in zip(files, numbers, strict=True) if numbers.count(number) > 1), None):
        raise UserError(f"part {Path(twice).name!r} of {split} is there twice: leave one of them out of --data")
    if missing := sorted(set(range(count)) - set(numbers)):
        raise UserError(
            f"{Path(files[0]).name!r} is one of {count} parts of {split}, of which number {missing[0]} is missing: add "
            "it to --data"
        )


def _read_parts(sources: Sequence[str | Table], read: Callable[[str | Table], Any]) -> Any:
    parts = [read(source) for source in sources]
    if len(parts) == 1:
        return parts[0]
    if not isinstance(parts[0], Table):
        return [example for part in parts for example in part]
    columns = dict.fromkeys(column for part in parts for column in part.columns)
    return Table(
        f"{parts[0].name} and others",
        tuple(columns),
        [row for part in parts for row in part.rows],
        [f"{number} of {Path(part.name).name}" for part in parts for number in part.numbers],
    )


def _are_left_out(sources: Sequence[str | Table], is_unlabelled: Callable[[str | Table], bool]) -> bool:
    if not all(map(is_unlabelled, sources)):
        return False
    for source in sources:
        logger.info(f"{source.name if isinstance(source, Table) else source} has no labels and is left out")
    return True


def _select(content: Any, indices: Sequence[int]) -> Any:
    return content.select(indices) if isinstance(content, Table) else [content[index] for index in indices]
