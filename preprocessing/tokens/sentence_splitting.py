r"""The sentences of a document, which packing keeps whole.

`lines` takes the document's lines. `rules` also ends a sentence inside a line:

* at one of the marks of Latin text before white space, unless a lower-case letter comes next or the mark is the point
  of an abbreviation, a single letter or a number of one or two digits. Between Chinese or Japanese characters no white
  space is needed.
* at a mark that ends sentences in other scripts (。 ۔ ። ។ and the like), with or without white space, as Unicode's
  rules do (UAX #29, SB8a and SB11).

The rules have no dictionary except a few abbreviations, so they find nothing in Thai or Lao text, which has no such
marks.

Both give the same text: as bytes, the sentences are separated by `\n` where they had white space between them, and
otherwise by `\r`, which no document contains.
"""

from __future__ import annotations

import re

RULES_VERSION = 3
"""Version of `rules`, raised with every change of what they find."""

_NEAR_TERMINALS = (
    r"\u0589\u061d-\u061f\u06d4\u0700-\u0702\u07f9\u0837\u0839\u083d\u083e\u0964\u0965\u104a\u104b\u1362\u1367\u1368"
    r"\u166e\u1735\u1736\u17d4\u17d5\u1803\u1809\u1944\u1945\u1aa8-\u1aab\u1b4e\u1b4f\u1b5a\u1b5b\u1b5e\u1b5f"
    r"\u1b7d-\u1b7f\u1c3b\u1c3c\u1c7e\u1c7f\u203c\u203d\u2047-\u2049\u2cf9-\u2cfb\u2e2e\u2e3c\u2e53\u2e54\u2e60\u2e61"
    r"\u3002\ua4ff\ua60e\ua60f\ua6f3\ua6f7\ua876\ua877\ua8ce\ua8cf\ua92f\ua9c8\ua9c9\uaa5d-\uaa5f\uaaf0\uaaf1\uabeb"
    r"\ufe12\ufe15\ufe16\ufe56\ufe57\uff01\uff1f\uff61"
)
_FAR_TERMINALS = (
    r"\U00010a56\U00010a57\U00010f55-\U00010f59\U00010f86-\U00010f89\U00011047\U00011048\U000110be-\U000110c1"
    r"\U00011141-\U00011143\U000111c5\U000111c6\U000111cd\U000111de\U000111df\U00011238\U00011239\U0001123b\U0001123c"
    r"\U000112a9\U000113d4\U000113d5\U0001144b\U0001144c\U000115c2\U000115c3\U000115c9-\U000115d7\U00011641\U00011642"
    r"\U0001173c-\U0001173e\U00011944\U00011946\U00011a42\U00011a43\U00011a9b\U00011a9c\U00011c41\U00011c42\U00011ef7"
    r"\U00011ef8\U00011f43\U00011f44\U00016a6e\U00016a6f\U00016af5\U00016b37\U00016b38\U00016b44\U00016d6e\U00016d6f"
    r"\U00016e98\U0001bc9f\U0001da88"
)
_TERMINALS = _NEAR_TERMINALS + _FAR_TERMINALS
"""Unicode 17's Sentence_Terminal (PropList.txt) without `!`, `?` and points, in plane 0 (near) and above it (far). The
list is here because the bytes of shards must not depend on the Unicode version of a library."""
_CONTINUING = frozenset(",-:;՝،؍߸᠂᠈–—、︐︑︓︔︱︲﹐﹑﹕﹘﹣，－：；､")
"""Unicode's Sentence_Break=SContinue: no sentence ends before one."""
_GEORGIAN = range(0x10D0, 0x1100)
"""Letters that Unicode calls lower-case but that begin sentences, because their capitals are not used in writing."""
_CJK = r"\u3041-\u30ff\u3105-\u312f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CLOSING = "\"'”’»›)\\]」』"
_WIDE_CLOSING = f"{_CLOSING}}}）］｝｠｣】〉》〗〙〛〕〞〟﹂﹄"
_OPENING = "\"'“‘«‹(\\[¿¡„「『—–-"
_WIDE_OPENING = "\"'“‘«‹(\\[「『（［｛【〈《〖〔"
_END = re.compile(  # starts with one small set of characters, to be fast
    rf"[.!?…．{_NEAR_TERMINALS}\U00010000-\U0001ffff](?:"
    rf"(?<=[.!?…．])[.!?…．]{{0,7}}[{_CLOSING}]{{0,8}}(?=\s)"  # bounded, so that a line of points stays linear
    rf"|(?<=[{_CJK}][.!?．])[.!?．]{{0,7}}[{_WIDE_CLOSING}]{{0,8}}(?=[{_WIDE_OPENING}]{{0,8}}[{_CJK}])"
    rf"|(?<![.!?…．])(?<=[{_TERMINALS}])[.!?…{_TERMINALS}\ufe0e\ufe0f]*[{_WIDE_CLOSING}]*)"
)
_NEXT = re.compile(rf"(\s*)[{_OPENING}]{{0,8}}")
_WORD_BEFORE_POINT = re.compile(r"(?:^|[\s(\[\"'“‘«„/—–-])([^\W_](?:[^\W_]|\.(?=[^\W_])){0,7})\Z")
_LONGEST_WORD, _ORDINAL_DIGITS = 12, 2
_SPACE_BEFORE_NEWLINE = re.compile(r"\n(?<=\s\n)")  # starts with a letter, not the look-behind, to be fast
_ABBREVIATIONS = frozenset(
    re.findall(
        r"\w+",
        "adm al approx apr art aug ave bd blvd bros bzw ca capt cf ch chap cmdr co col corp dec dept dr ed eds eq esp "
        "est etc ex feb fig figs fr ft gen gov hon hr inc jan jr jul jun lt ltd mar messrs mr mrs ms mt nos nov nr oct "
        "op p pp pres prof ref rep rev rs sec sen sep sept sgt sr st str tab usw vgl viz vol vols vs",
    )
)


def sentence_bytes(text: str, kind: str) -> bytes:
    """Return the sentences of a document, none of them empty or ending in white space, separated as described above.

    Args:
        kind: "lines", in which case most texts are left as they are, or "rules".
    """
    if kind != "lines" or text[0] == "\n" or text[-1].isspace() or _SPACE_BEFORE_NEWLINE.search(text):
        lines = [line for line in map(str.rstrip, text.split("\n")) if line]
        text = "\n".join(map(_by_rules, lines) if kind == "rules" else lines)
    return text.encode("utf-8")


def tokenizer_lines(document: bytes) -> bytes:
    r"""Return the sentences as the tokenizer sees them, separated by `\n`; those after white space begin with a space.

    Byte-level BPE marks a word's start by the space before it. With that space, the first word of a line looks like the
    same word elsewhere, and the ids of the whole document decode to readable text.
    """
    return document.replace(b"\n", b"\n ").replace(b"\r", b"\n")


def _by_rules(line: str) -> str:
    parts, start = [], 0
    for match in _END.finditer(line):
        following = _NEXT.match(line, match.end())
        assert following is not None  # it may be empty
        begin = following.end(1)
        if begin < len(line) and _ends_a_sentence(line, match.start(), begin, following.end()):
            parts += [line[start : match.end()], "\n" if begin > match.end() else "\r"]
            start = begin
    return "".join([*parts, line[start:]])


def _ends_a_sentence(line: str, mark: int, begin: int, following: int) -> bool:
    """Return whether the closing mark at `mark` ends a sentence, if the next would begin at `begin` and its first word
    at `following`."""
    if line[mark] not in ".!?…．":
        return line[begin] not in _CONTINUING
    first = line[following : following + 1]
    if first.islower() and ord(first) not in _GEORGIAN:
        return False
    if line[mark] not in ".．" or line[mark + 1 : mark + 2] == ".":
        return True
    word = _WORD_BEFORE_POINT.search(line[max(0, mark - _LONGEST_WORD) : mark])
    if word is None:
        return True
    before = word[1]
    letter = len(before) == 1 and (before.isupper() or "a" <= before <= "z") and before != "I"  # "J. R.", "d. h."
    # "3. The third"; many languages write ordinals so, "am 3. Oktober".
    number = before.isdigit() and (len(before) <= _ORDINAL_DIGITS or mark == len(before))
    return not (letter or number or ("." in before and before[-2] == ".") or before.lower() in _ABBREVIATIONS)
