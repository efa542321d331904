"""Documents and located rejects from bytes, whatever the blocks in which they arrive."""

import random

import pytest

from ds_roberta.errors import UserError
from ds_roberta.inputs import borders
from ds_roberta.inputs.borders import cut_at_borders
from ds_roberta.inputs.pieces import Piece, Reject
from preprocessing.reading.documents import Document, ReadOptions
from preprocessing.reading.readers import read_documents
from preprocessing.tokens.sentence_splitting import sentence_bytes, tokenizer_lines

NEWLINES = ("\n", "\r\n", "\r")


def read(path, data, start=0, **options):
    path.write_bytes(data)
    found = read_documents(Piece(str(path), start, len(data)), ReadOptions(**options))
    return [item.text if isinstance(item, Document) else item for item in found]


def documents(path, data, **options):
    return [sentence_bytes(text, "lines").decode().split("\n") for text in read(path, data, **options)]


@pytest.mark.parametrize("newline", NEWLINES)
def test_blank_lines_separate_documents_whatever_the_newlines(tmp_path, newline):
    text = "\n \none  \ntwo\n\n \t\n\n  three\n\nfour"
    data = text.replace("\n", newline).encode()
    assert documents(tmp_path / "a.txt", data) == [["one", "two"], ["  three"], ["four"]]


@pytest.mark.parametrize("newline", NEWLINES)
def test_with_one_document_per_line_blank_lines_are_empty_documents(tmp_path, newline):
    data = "one\n\n two\n".replace("\n", newline).encode()
    found = read(tmp_path / "a.txt", data, documents="line")
    assert [item if isinstance(item, str) else item.reason for item in found] == ["one", "empty", " two"]


def test_one_document_per_file(tmp_path):
    assert read(tmp_path / "a.txt", b"one\n\ntwo\r\n", documents="file") == ["one\n\ntwo\n"]
    assert [item.reason for item in read(tmp_path / "b.txt", b"", documents="file")] == ["empty"]


def test_a_byte_order_mark_is_dropped_only_at_the_start_of_the_file(tmp_path):
    mark = "\ufeff".encode()
    assert read(tmp_path / "a.txt", mark + b"one\n\n" + mark + b"two") == ["one", "\ufefftwo"]
    assert read(tmp_path / "a.txt", b"one\n\n" + mark + b"two", start=5) == ["\ufefftwo"]
    assert read(tmp_path / "a.jsonl", mark + b'{"text": "one"}') == ["one"]


def test_a_bad_byte_is_located_and_spoils_only_its_document(tmp_path):
    found = read(tmp_path / "a.txt", b"one\n\nt\xffwo\n\nthree")
    assert [item if isinstance(item, str) else item[:2] for item in found] == ["one", ("not_utf8", 5), "three"]
    assert found[1].detail == "byte 6 (0xff) is not UTF-8"


def test_offsets_of_rejects_count_from_the_start_of_the_file(tmp_path):
    (reject,) = read(tmp_path / "a.txt", b"one\n\ntw\xff", start=5)
    assert reject == Reject("not_utf8", 5, "byte 7 (0xff) is not UTF-8")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": oops}', "bad_json"),
        (b'["text"]', "bad_json"),
        (b'{"text": "\\ud800"}', "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b'{"body": "x"}', "missing_column"),
        (b'{"text": 7}', "missing_column"),
        (b'{"text": null}', "empty"),
        (b'{"text": "\xff"}', "not_utf8"),
        (b'{"text": " \\n"}', "empty"),
    ],
)
def test_each_bad_json_line_has_its_reason(tmp_path, line, reason):
    found = read(tmp_path / "a.jsonl", b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}')
    assert [item if isinstance(item, str) else item.reason for item in found] == ["one", reason, "two"]


def test_the_text_of_a_json_line_comes_from_its_column(tmp_path):
    found = read(tmp_path / "a.jsonl", b'{"body": "a\\r\\nb\\n\\nc", "text": "x"}\r\n', text_column="body")
    assert found == ["a\nb\n\nc"]


def test_a_csv_header_of_any_bytes_can_be_named(tmp_path):
    (reject,) = read(tmp_path / "a.csv", "id,naïve\n1,foo\n".encode("latin-1"))
    assert reject.detail == r"column 'text' is missing (the header has 'id', 'na\udcefve')"


def test_a_file_that_became_shorter_is_an_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one")
    with pytest.raises(UserError, match="shorter"):
        list(read_documents(Piece(str(path), 0, 10), ReadOptions()))


def test_sentences_lose_trailing_white_space_and_all_but_the_first_begin_with_a_space():
    document = sentence_bytes("one. \n\n\ttwo\t\n  \nthree", "lines")
    assert document == b"one.\n\ttwo\nthree"
    assert tokenizer_lines(document) == b"one.\n \ttwo\n three"


@pytest.fixture
def documents_in(tmp_path):
    """A function that reads bytes as one piece of a file."""

    def read(data, kind):
        path = tmp_path / "a.txt"
        path.write_bytes(data)
        found = read_documents(Piece(str(path), 0, len(data)), ReadOptions(kind))
        return [item.text if isinstance(item, Document) else item.reason for item in found]

    return read


def random_bytes(generator, newlines):
    parts = [*newlines * 2, b" ", b"\t", b"x", b"yy", b"z" * 9]
    return b"".join(generator.choices(parts, k=40))


@pytest.mark.parametrize("kind", ["blank-line", "line", "file"])
@pytest.mark.parametrize("newlines", [[b"\n"], [b"\r\n"], [b"\r"], [b"\n", b"\r\n", b"\r"]])
def test_chunks_hold_the_documents_of_the_whole(documents_in, monkeypatch, kind, newlines):
    generator = random.Random(3)
    monkeypatch.setattr(borders, "_LAST_WINDOW", 2)
    for _ in range(60):
        data, size = random_bytes(generator, newlines), generator.randint(1, 12)
        blocks = [data[i : i + size] for i in range(0, len(data), size)]
        chunks = list(cut_at_borders(blocks, kind, longest=1000))
        assert b"".join(chunk for _, chunk in chunks) == data
        assert [offset for offset, _ in chunks] == [sum(len(c) for _, c in chunks[:i]) for i in range(len(chunks))]
        assert [text for _, chunk in chunks for text in documents_in(chunk, kind)] == documents_in(data, kind)
        if kind == "line" and newlines == [b"\n"]:
            assert len(chunks) > 1


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_a_document_that_is_too_long_ends_at_its_border_wherever_the_blocks_do(newline):
    for size in range(1, 9):
        data = b"a" + newline * 2 + b"x" * 40 + newline + b" " + newline + b"b"
        blocks = [data[i : i + size] for i in range(0, len(data), size)]
        chunks = list(cut_at_borders(blocks, "blank-line", longest=20))
        passed_over = 40 + 1 + 2 * len(newline)  # in bytes
        assert [chunk for _, chunk in chunks] in (
            [b"a" + newline * 2, passed_over, b"b"],
            [b"a" + newline * 2, passed_over, b"", b"b"],
        )
        assert [data[offset:].strip()[:1] for offset, _ in chunks] == [b"a", b"x", b"b"]


@pytest.mark.parametrize("kind", ["blank-line", "line"])
def test_only_documents_that_are_too_long_are_passed_over_wherever_the_blocks_end(kind):
    generator, separator, longest = random.Random(5), {"blank-line": b"\n\n", "line": b"\n"}[kind], 20
    for _ in range(300):
        size = generator.randint(1, 40)
        documents = [b"x" * generator.choice((1, 5, longest - 2, 50, 90, 300)) + separator for _ in range(12)]
        data, passed = b"".join(documents), []
        blocks = [data[i : i + size] for i in range(0, len(data), size)]
        chunks = list(cut_at_borders(blocks, kind, longest, passed.append))
        kept = [document for _, chunk in chunks if isinstance(chunk, bytes) for document in chunk.split(separator)]
        left_out = [chunk for _, chunk in chunks if isinstance(chunk, int)]
        assert [document for document in kept if 0 < len(document) < longest] == [
            document.removesuffix(separator) for document in documents if len(document) <= longest
        ]
        assert set(left_out) <= {len(document) for document in documents if len(document) > longest}
        assert len(left_out) >= sum(len(document) > longest + 2 * size for document in documents)
        assert b"".join(passed) == b"".join(b"x" * (left - len(separator)) + separator for left in left_out)
        assert sum(len(c) if isinstance(c, bytes) else c for _, c in chunks) == len(data)
