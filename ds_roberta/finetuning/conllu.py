"""CoNLL-U, the format of Universal Dependencies (universaldependencies.org/format.html), as sentences with tags."""

from __future__ import annotations

import re

from ds_roberta.errors import UserError
from ds_roberta.finetuning.tagged_sentences import (
    OUTSIDE,
    UNSPECIFIED,
    Sentence,
    are_of_entities,
    check_tags,
    split_columns,
)
from ds_roberta.process import logger

UPOS, XPOS, MISC = "UPOS", "XPOS", "MISC"
COLUMNS = ("ID", "FORM", "LEMMA", UPOS, XPOS, "FEATS", "HEAD", "DEPREL", "DEPS", MISC)
TAG_COLUMNS = (UPOS, XPOS, MISC)
_ID = re.compile(r"\d+|\d+-\d+|\d+\.\d+")  # a word, the surface form of several, a word that only the syntax has


def is_conllu(text: str) -> bool:
    """Whether a file's first row that is no comment has CoNLL-U's columns."""
    rows = (columns for line in text.split("\n") if (columns := split_columns(line)) and not columns[0].startswith("#"))
    first = next(rows, [])
    return len(first) == len(COLUMNS) and bool(_ID.fullmatch(first[0]))


def has_tags(text: str, tag_column: str) -> bool:
    """Whether some row of CoNLL-U has a tag; see `parse_conllu`."""
    rows = (columns for line in text.split("\n") if len(columns := split_columns(line)) == len(COLUMNS))
    return any(_tag(dict(zip(COLUMNS, columns, strict=True)), tag_column) for columns in rows)


def parse_conllu(name: str, text: str, tag_column: str = UPOS, *, labelled: bool = True) -> list[Sentence]:
    """The syntactic words of each sentence. Ranges such as `1-2`, whose words follow, and empty nodes such as `8.1` are
    skipped.

    Args:
        tag_column: `UPOS`, `XPOS`, or a key in `MISC`; if its values mark entities, words without it are outside them.
        labelled: whether there must be tags. If not, the columns that may have some are among `others`.

    Raises:
        UserError: there are no sentences, a row has another number of columns, its number is not the next one, its word
            or tag is missing, or as `check_tags`.
    """
    rows: list[list[tuple[str, str, str | None]]] = [[]]  # of each sentence: place, word, tag
    others: list[dict[str, list[str]]] = [{}]
    for number, columns in enumerate(map(split_columns, text.split("\n")), 1):
        place = f"{name}, row {number}"
        if not columns:
            rows.append([])
            others.append({})
            continue
        if columns[0].startswith("#") and not rows[-1]:
            continue
        if len(columns) != len(COLUMNS):
            raise UserError(f"{place} has {len(columns)} columns, CoNLL-U has {len(COLUMNS)}: fix the row")
        fields = dict(zip(COLUMNS, columns, strict=True))
        if not _ID.fullmatch(fields["ID"]) or (fields["ID"].isdecimal() and int(fields["ID"]) != len(rows[-1]) + 1):
            raise UserError(
                f"{place} has the ID {fields['ID']!r}, but the next word is {len(rows[-1]) + 1}: fix the row, or "
                "separate sentences by an empty line"
            )
        if fields["ID"].isdecimal():
            if not fields["FORM"].strip():
                raise UserError(f"{place} has no word in its column FORM: fix or remove the row")
            rows[-1].append((place, fields["FORM"], _tag(fields, tag_column)))
            for column in () if labelled else TAG_COLUMNS:
                others[-1].setdefault(column, []).append(fields[column])
    others = [of_sentence for of_sentence, sentence in zip(others, rows, strict=True) if sentence]
    rows = [sentence for sentence in rows if sentence]
    if not rows:
        raise UserError(f"{name!r} has no sentences: choose a file with a word and its tag on each line")
    tags = _complete(name, rows, tag_column) if labelled else [()] * len(rows)
    return [
        Sentence(sentence[0][0], tuple(word for _, word, _ in sentence), of_sentence, others=of_others)
        for sentence, of_sentence, of_others in zip(rows, tags, others, strict=True)
    ]


def _tag(fields: dict[str, str], column: str) -> str | None:
    if column not in (UPOS, XPOS):
        return dict(entry.partition("=")[::2] for entry in fields[MISC].split("|")).get(column)
    return None if fields[column] == UNSPECIFIED else fields[column]


def _complete(name: str, rows: list[list[tuple[str, str, str | None]]], column: str) -> list[tuple[str, ...]]:
    """Each sentence's tags, with `O` where only entities have one."""
    words = [row for sentence in rows for row in sentence]
    tagged = [(place, tag) for place, _, tag in words if tag]
    if not tagged:
        raise UserError(
            f"no word of {name!r} has a tag {column!r}: give {UPOS}, {XPOS} or a key in MISC as --conllu_column"
        )
    check_tags(tagged)
    missing = [place for place, _, tag in words if not tag]
    if missing:
        if not are_of_entities({tag for _, tag in tagged}):
            raise UserError(
                f"{missing[0]} has no {column}, unlike {len(tagged):,} other words: write it, or choose another column"
            )
        logger.info(f"{name}: {len(missing):,} of {len(words):,} words have no {column} and are outside of entities")
    return [tuple(tag or OUTSIDE for _, _, tag in sentence) for sentence in rows]
