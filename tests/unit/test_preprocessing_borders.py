"""Cutting a stream into chunks loses, joins and parts no document, whatever the blocks are."""

import random

import pytest

from preprocessing.reading import borders
from preprocessing.reading.borders import cut_at_borders
from preprocessing.reading.documents import Document, Piece, ReadOptions
from preprocessing.reading.readers import read_documents


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
