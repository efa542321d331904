"""Sentences as words with tags: CoNLL's columns, rows of lists, and texts that are split into words."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from typing import Any

import regex

from ds_roberta.data.words import UNSPACED
from ds_roberta.errors import UserError
from ds_roberta.finetuning.labelled_tables import TEXT_COLUMNS, listed, without
from ds_roberta.inputs.tables import Table
from ds_roberta.process import logger

WORD_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("tags", "ner_tags", "labels", "pos_tags", "upos")
WORDS_IN_HEADERS = {"form", "text", "token", "word", *WORD_COLUMNS}
TAGS_IN_HEADERS = {"label", "ner", "ner_tag", "pos", "pos_tag", "postag", "tag", "xpos", *TAG_COLUMNS}
OUTSIDE = "O"
DOCUMENT_START = "-DOCSTART-"
ENTITY_TAG = re.compile(r"O|[BIESLU](-[^-].*)?")  # IOB1, IOB2, IOBES, BILUO; not XPOS such as I-------
UNSPECIFIED = "_"  # as CoNLL-U writes it
SCHEMES = {"E": "IOBES", "S": "IOBES", "L": "BILUO", "U": "BILUO"}
GIVE_TEXTS = "give texts as a table with a column 'text' (.jsonl, .csv, .tsv)"
_LETTER = rf"[\w--{UNSPACED.pattern}]"  # regex counts marks and joiners as parts of words, which re does not
WORD_IN_TEXT = regex.compile(rf"(?V1)(?={UNSPACED.pattern}|[^\w\s])\X|{_LETTER}+(?:[.'’-]{_LETTER}+)*")
"""In scripts without spaces each character, with its marks, is a word."""


@dataclass(frozen=True)
class Sentence:
    """A sentence as words, with their tags if they are known.

    Attributes:
        place: the sentence's place in its file, for messages.
        words: none is empty; a text to be predicted may have none.
        tags: one for each word; empty if there are none.
        text: what the words were taken from; None if they were given one by one.
        offsets: each word as [start, end) in characters of the text, if there is one.
        others: the other columns of the sentence's row.
    """

    place: str = field(repr=False)
    words: tuple[str, ...]
    tags: tuple[str, ...] = ()
    text: str | None = None
    offsets: tuple[tuple[int, int], ...] = ()
    others: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def located(self) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The text and the words' offsets in it; without a text, the one in which spaces join the words."""
        if self.text is not None:
            return self.text, self.offsets
        ends = list(accumulate(len(word) + 1 for word in self.words))
        offsets = tuple((end - 1 - len(word), end - 1) for word, end in zip(self.words, ends, strict=True))
        return " ".join(self.words), offsets


def parse_conll(name: str, text: str, *, labelled: bool = True, names: Collection[str] = ()) -> list[Sentence]:
    """One word per line with its tag in the last column; empty lines separate sentences. Columns are separated by tabs,
    or by spaces in lines without tabs. Lines with `-DOCSTART-` are skipped, and so are lines that start with `#` at the
    beginning of a sentence and have another number of columns or do not end in a tag of the file; a line such as
    `#word<TAB>tag` is a word. So is a header.

    Args:
        labelled: whether there must be tags. If not, lines may have one column, and a last column of tags is among
            `others`.
        names: tags that the last column may have besides those of entities, if not `labelled`.

    Raises:
        UserError: there are no sentences, a header has the words elsewhere than first, a line has no tag or another
            number of columns, most lines have several columns but no tag, or as `check_tags`.
    """
    written = text.split("\n")
    lines = list(enumerate(map(split_columns, written), 1))
    begin = next((index for index, (_, columns) in enumerate(lines) if columns), 0)
    header = lines[begin][1]
    if (of_words := _words_of_header(header)) is not None:
        if of_words > 0:
            raise UserError(
                f"{name}, row {begin + 1} names the columns, the first of them {header[0]!r}: move the words into the "
                "first column"
            )
        logger.info(f"{name}: row {begin + 1} names the columns and is left out")
        del lines[: begin + 1]
    rows = [columns for _, columns in lines if _is_plain(columns)]
    within = [columns for (_, before), (_, columns) in pairwise(lines) if columns and _is_plain(before)]
    known = {columns[-1] for columns in (*rows, *within)}
    width = len(rows[0]) if rows else 0
    sentences: list[Sentence] = []
    tagged: list[tuple[str, str]] = []
    words: list[str] = []
    tags: list[str] = []
    first = 0  # line of the sentence's first word

    def close() -> None:
        if words:
            place, of_sentence = f"{name}, row {first}", tuple(words)
            if labelled:
                sentences.append(Sentence(place, of_sentence, tuple(tags)))
            else:
                sentences.append(Sentence(place, of_sentence, others={"tags": list(tags)} if tags else {}))
            words.clear()
            tags.clear()

    for number, columns in lines:
        if not columns or columns[0] == DOCUMENT_START:
            close()
            continue
        if not words and len(columns) > 1 and columns[0].startswith("#"):
            is_hashtag = "\t" in written[number - 1] and columns[0][1:2].strip() and len(columns) == width
            is_tagged = columns[-1] in known or ENTITY_TAG.fullmatch(columns[-1])
            if not (is_hashtag or is_tagged) or (columns[0] == "#" and width not in (0, len(columns))):
                continue
        place = f"{name}, row {number}"
        if not columns[0].strip():
            raise UserError(f"{place} has no word in its first column: fix or remove the row")
        if labelled and len(columns) < 2:
            raise UserError(f"{place} has the word {columns[0]!r} but no tag: write the tag in its last column")
        if len(columns) != (width or len(columns)):
            remedy = "fix the row" if labelled else f"fix the row, or {GIVE_TEXTS}"
            raise UserError(f"{place} has {len(columns)} columns, the first row with a word has {width}: {remedy}")
        if len(columns) > 1:
            tags.append(columns[-1])
            tagged.append((place, columns[-1]))
        first = first if words else number
        words.append(columns[0])
    close()
    if all(sentence.words == tuple(map(str, range(1, len(sentence.words) + 1))) for sentence in sentences) and any(
        len(sentence.words) > 1 for sentence in sentences
    ):
        raise UserError(f"the first column of {name!r} numbers the words: remove it")
    if not sentences:
        raise UserError(f"{name!r} has no sentences: choose a file with a word and its tag on each line")
    if labelled:
        check_tags(tagged)
        if of_words is None:
            _warn_of_header(tagged)
    elif 2 * sum(is_tag(tag, names) for _, tag in tagged) < len(tagged):
        place, tag = next((place, tag) for place, tag in tagged if not is_tag(tag, names))
        raise UserError(
            f"{place} has {width} columns, but {tag!r} in the last one is no tag that the model knows: leave only the "
            f"column of the words, or {GIVE_TEXTS}"
        )
    return sentences


def _is_plain(columns: Sequence[str]) -> bool:
    """Whether a line has a word that cannot be taken for the mark of a comment."""
    return bool(columns) and not columns[0].startswith(("#", DOCUMENT_START))


def is_tag(value: str, names: Collection[str]) -> bool:
    """Whether a value of CoNLL's last column is a tag of entities, one of `names` or `_`. A mark such as `.` does not
    count: it is a tag in some data, and ends sentences in others."""
    known = value in names and any(map(str.isalnum, value))
    return known or value == UNSPECIFIED or bool(ENTITY_TAG.fullmatch(value))


def _words_of_header(columns: Sequence[str]) -> int | None:
    """Which column has the words, if a line names CoNLL's columns, of which the last has the tags; else None."""
    *others, last = (re.sub(r"[\s-]+", "_", name.strip().lower()) for name in columns or ("",))
    if last not in TAGS_IN_HEADERS:
        return None
    return next((place for place, name in enumerate(others) if name in WORDS_IN_HEADERS), None)


def _warn_of_header(tagged: Sequence[tuple[str, str]]) -> None:
    """Name the first row if its tag occurs nowhere else, as that of a header with unusual names; among tags of
    entities, such a tag is refused."""
    tags = [tag for _, tag in tagged]
    if tags.count(tags[0]) == 1 and not are_of_entities(tags):
        logger.warning(f"{tagged[0][0]}: no other row has the tag {tags[0]!r}; remove the row if it names the columns")


def has_header(text: str, text_column: str | None, names: Collection[str]) -> bool:
    """Whether a `.tsv` begins with names of columns, one of which has texts, and not with a word and its tag. One
    column is of words, unless a line after its name has a space.

    Args:
        text_column: a name that counts besides the usual ones.
        names: the model's tags; see `is_tag`.
    """
    first, _, rest = text.lstrip().partition("\n")
    columns = [name.strip().strip('"') for name in first.split("\t")]
    of_words = _words_of_header(columns) if text_column is None else None
    if of_words is not None:
        rows = (line.split("\t") for line in rest.split("\n"))
        if not any(" " in cell for row in rows for cell in row[of_words : of_words + 1]):
            return False
    if not {text_column, *WORD_COLUMNS, *chain.from_iterable(TEXT_COLUMNS)} & set(columns):
        return False
    return not is_tag(columns[-1], names) if len(columns) > 1 else " " in rest


def table_sentences(
    table: Table, word_column: str | None, tag_column: str | None, *, labelled: bool = True
) -> list[Sentence]:
    """The sentences of rows with a list of words and, if `labelled`, a list of tags.

    Args:
        word_column: None: the first of `WORD_COLUMNS`.
        tag_column: None: the first of `TAG_COLUMNS`.

    Raises:
        UserError: a column is missing; a row's lists are empty, differ in length or have items that are not text; or as
            `check_tags`.
    """
    word_column = _column(table, word_column, WORD_COLUMNS, "--text_column")
    if labelled:
        tag_column = _column(table, tag_column, TAG_COLUMNS, "--label_column")
    sentences = []
    for index, row in enumerate(table.rows):
        place = table.place(index)
        words = _texts(place, word_column, row.get(word_column))
        tags: tuple[str, ...] = ()
        if labelled:
            assert tag_column is not None
            tags = _texts(place, tag_column, row.get(tag_column))
            if len(tags) != len(words):
                raise UserError(f"{place} has {len(words)} words but {len(tags)} tags: give each word one")
        sentences.append(Sentence(place, words, tags, others=without(row, word_column)))
    check_tags((sentence.place, tag) for sentence in sentences for tag in sentence.tags)
    return sentences


def split_text(
    place: str, text: str, entities: Sequence[tuple[int, int, str]] | None = None, *, or_none: bool = False
) -> Sentence:
    """The words and punctuation marks of a text, separated as in the data of token classification. In a script without
    spaces between words, each character is one.

    Args:
        entities: the start, end and type of each, in order and without overlap. Their words are tagged B- and I-, the
            others O. A word in which one begins or ends is split there, so that the tags mark exactly these characters.
            None: the words have no tags.
        or_none: whether a text may have no words.

    Raises:
        UserError: the text has no words, but must have some.
    """
    words, tags = list[tuple[int, int]](), list[str]()
    done = 0
    for start, end, type_ in [*(entities or ()), (len(text), len(text), "")]:
        outside = [match.span() for match in WORD_IN_TEXT.finditer(text, done, start)]
        inside = [match.span() for match in WORD_IN_TEXT.finditer(text, start, end)]
        words += outside + inside
        tags += [OUTSIDE] * len(outside) + [f"{'I' if number else 'B'}-{type_}" for number in range(len(inside))]
        done = end
    if not (words or or_none):
        raise UserError(f"{place}: the text {text!r} has no words: choose another")
    found = tuple(text[start:end] for start, end in words)
    return Sentence(place, found, () if entities is None else tuple(tags), text, tuple(words))


def tag_names(train: Iterable[Sentence]) -> list[str]:
    """The training sentences' tags in alphabetical order; if they mark entities, `O` first, then by type and prefix."""
    found = {tag for sentence in train for tag in sentence.tags}
    if not are_of_entities(found):
        return sorted(found)
    return sorted(found | {OUTSIDE}, key=lambda tag: (tag != OUTSIDE, tag.partition("-")[::-1]))


def are_of_entities(tags: Iterable[str]) -> bool:
    """Whether tags mark entities: some are like `B-PER`, or all are `B`, `I` and `O`, with `E` and `S` or `L` and `U`.
    Others label single words, as parts of speech do, or as `L`, `O` and `U` may do without a `B`."""
    fitting = {tag: bool(ENTITY_TAG.fullmatch(tag)) for tag in tags}
    if any(fits and "-" in tag for tag, fits in fitting.items()):
        return True
    return all(fitting.values()) and ("B" in fitting or not {"L", "U"} & fitting.keys())


def check_tags(tagged: Iterable[tuple[str, str]]) -> None:
    """Check the form of tags that mark entities.

    Args:
        tagged: a file's tags, each with its place.

    Raises:
        UserError: the tags mark entities, but one is neither `O` nor like `B-PER`, or as `check_scheme`.
    """
    tagged = list(tagged)
    if not are_of_entities({tag for _, tag in tagged}):
        return
    for place, tag in tagged:
        if not ENTITY_TAG.fullmatch(tag):
            raise UserError(
                f"{place}: the tag {tag!r} is neither O nor like B-PER (B, I, E, S, L or U and a type), unlike others: "
                "fix it"
            )
    check_scheme(tagged)


def check_scheme(tagged: Iterable[tuple[str, str]]) -> None:
    """Raise `UserError` if entities are marked in two ways, some by the letters of IOBES and some by those of BILUO.

    Args:
        tagged: tags that mark entities, each with its place.
    """
    first: dict[str, tuple[str, str]] = {}
    for place, tag in tagged:
        if tag[0] in SCHEMES:
            first.setdefault(SCHEMES[tag[0]], (place, tag))
    if len(first) > 1:
        (scheme, (place, tag)), (other, (other_place, other_tag)) = first.items()
        raise UserError(
            f"{other_place}: the tag {other_tag!r} belongs to {other}, but {tag!r} ({place}) to {scheme}: use one of "
            "the two for all"
        )


def split_columns(line: str) -> list[str]:
    """The columns of a line, which are separated by tabs, or by spaces if it has no tabs. Other white space, such as a
    no-break space, is part of a word, but a line of nothing else is empty."""
    line = line.rstrip(" \t\r") if line.strip() else ""
    return line.split("\t") if "\t" in line else re.findall("[^ ]+", line)


def _column(table: Table, column: str | None, usual: tuple[str, ...], option: str) -> str:
    found = column or next((name for name in usual if name in table.columns), None)
    if found is None or found not in table.columns:
        raise UserError(
            f"{table.name} has no column {' or '.join(map(repr, [column] if column else usual))}: give one of "
            f"{listed(table)} as {option}"
        )
    return found


def _texts(place: str, column: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{place}: {column!r} is {value!r}, not a list of texts: fix or remove the row")
    if all(isinstance(number, int) for number in value):
        raise UserError(
            f"{place}: {column!r} has numbers: give their names, such as B-PER, or a folder saved by datasets, which "
            "has them"
        )
    for number, text in enumerate(value, 1):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{place}: item {number} of {column!r} is {text!r} but must be non-empty text: fix it")
    return tuple(value)
