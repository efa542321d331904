"""Sentences of a document: what packing keeps whole.

`lines` takes the document's lines. `rules` also ends a sentence inside a line at a closing mark that is followed by
white space, unless a small letter comes next or the mark is the point of an abbreviation, an initial or a number. The
rules use no dictionary of a language but a few abbreviations; they cut only where white space is, so that the text of
a document is the same with either.
"""

from __future__ import annotations

import re

SENTENCE_KINDS = ("lines", "rules")

_CLOSING = "\"'”’»›)\\]」』"
_OPENING = "\"'“‘«‹(\\[¿¡„「『—–-"
_END = re.compile(rf"[.!?…。！？।؟]{{1,8}}[{_CLOSING}]{{0,8}}(?=\s)")  # bounded: a line of points alone stays linear
_NEXT = re.compile(rf"\s+([{_OPENING}]{{0,8}})")
_WORD_BEFORE_POINT = re.compile(r"(?:^|[\s(\[\"'“‘«„/—–-])([^\W_](?:[^\W_]|\.(?=[^\W_])){0,7})\Z")
_LONGEST_WORD = 12
_SPACE_BEFORE_NEWLINE = re.compile(r"\n(?<=\s\n)")  # it opens with a letter, not the look-behind, to be found fast
_ABBREVIATIONS = frozenset(
    re.findall(
        r"\w+",
        "adm al approx apr art aug ave bd blvd bros bzw ca capt cf ch chap cmdr co col corp dec dept dr ed eds eq esp "
        "est etc ex feb fig figs fr ft gen gov hon hr inc jan jr jul jun lt ltd mar messrs mr mrs ms mt nos nov nr oct "
        "op p pp pres prof ref rep rev rs sec sen sep sept sgt sr st str tab usw vgl viz vol vols vs",
    )
)


def sentences(text: str, kind: str = "lines") -> list[str]:
    """The sentences of a document, none of them empty, without trailing white space; `kind` is one of the two."""
    lines = [line for line in map(str.rstrip, text.split("\n")) if line]
    if kind == "lines":
        return lines
    return [sentence for line in lines for sentence in _by_rules(line)]


def _by_rules(line: str) -> list[str]:
    found, start = [], 0
    for match in _END.finditer(line):
        following = _NEXT.match(line, match.end())
        if following and _ends_a_sentence(line, match.start(), following.end()):
            found.append(line[start : match.end()])
            start = following.start(1)
    return [*found, line[start:]]


def _ends_a_sentence(line: str, mark: int, following: int) -> bool:
    """Whether the closing mark at `mark` ends a sentence, where the next word begins at `following`."""
    if line[following : following + 1].islower():
        return False
    if line[mark] != "." or line[mark + 1 : mark + 2] == ".":
        return True
    word = _WORD_BEFORE_POINT.search(line[max(0, mark - _LONGEST_WORD) : mark])
    if word is None:
        return True
    before = word[1]
    initial = len(before) == 1 and before.isupper() and before != "I"
    numbering = before.isdigit() and mark == len(before)  # "3. The third"
    return not (initial or numbering or ("." in before and before[-2] == ".") or before.lower() in _ABBREVIATIONS)


def tokenizer_lines(document: list[str]) -> list[str]:
    """A document's sentences as the tokenizer sees them: all but the first open with a space.

    Byte-level BPE marks a word's start by the space before it. With it the first word of a line has the form that it
    has anywhere else, and the ids of the whole document decode to readable text.
    """
    return document[:1] + [f" {sentence}" for sentence in document[1:]]


def sentence_bytes(text: str, kind: str) -> bytes:
    """The sentences of a document, apart by `\\n`; most texts are so already where sentences are lines."""
    if kind != "lines" or text[0] == "\n" or text[-1].isspace() or _SPACE_BEFORE_NEWLINE.search(text):
        text = "\n".join(sentences(text, kind))
    return text.encode("utf-8")
