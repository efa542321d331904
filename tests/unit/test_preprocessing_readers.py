"""Documents and located rejects from bytes."""

import pytest

from ds_roberta.errors import UserError
from preprocessing.reading.documents import Document, Piece, ReadOptions
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
def test_a_line_a_document_counts_blank_lines_as_empty(tmp_path, newline):
    data = "one\n\n two\n".replace("\n", newline).encode()
    found = read(tmp_path / "a.txt", data, documents="line")
    assert [item if isinstance(item, str) else item.reason for item in found] == ["one", "empty", " two"]


def test_a_file_a_document(tmp_path):
    assert read(tmp_path / "a.txt", b"one\n\ntwo\r\n", documents="file") == ["one\n\ntwo\n"]
    assert [item.reason for item in read(tmp_path / "b.txt", b"", documents="file")] == ["empty"]


def test_a_byte_order_mark_is_dropped_only_at_the_start_of_the_file(tmp_path):
    mark = "\ufeff".encode()
    assert read(tmp_path / "a.txt", mark + b"one\n\n" + mark + b"two") == ["one", "\ufefftwo"]
    assert read(tmp_path / "a.txt", b"one\n\n" + mark + b"two", start=5) == ["\ufefftwo"]
    assert read(tmp_path / "a.jsonl", mark + b'{"text": "one"}') == ["one"]


def test_a_bad_byte_is_located_and_spoils_only_its_document(tmp_path):
    found = read(tmp_path / "a.txt", b"one\n\nt\xffwo\n\nthree")
    assert [item if isinstance(item, str) else item[:2] for item in found] == ["one", ("not_utf8", 6), "three"]


def test_offsets_of_rejects_count_from_the_start_of_the_file(tmp_path):
    (reject,) = read(tmp_path / "a.txt", b"one\n\ntw\xff", start=5)
    assert (reject.reason, reject.offset) == ("not_utf8", 7)


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


def test_a_file_that_became_shorter_is_an_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one")
    with pytest.raises(UserError, match="shorter"):
        list(read_documents(Piece(str(path), 0, 10), ReadOptions()))


def test_sentences_lose_trailing_white_space_and_all_but_the_first_open_with_a_space():
    document = sentence_bytes("one. \n\n\ttwo\t\n  \nthree", "lines")
    assert document == b"one.\n\ttwo\nthree"
    assert tokenizer_lines(document) == b"one.\n \ttwo\n three"
