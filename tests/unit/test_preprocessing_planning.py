"""Which files are read, and how they are cut into units."""

import random
from pathlib import Path

import datasets
import fsspec
import pytest

from ds_roberta.errors import UserError
from ds_roberta.inputs.paths import IGNORED, REPEATED, dataset_files, find_inputs
from ds_roberta.inputs.streams import READABLE
from preprocessing.reading.documents import Document, ReadOptions
from preprocessing.reading.planning import plan_units
from preprocessing.reading.readers import read_documents
from preprocessing.tokens.sentence_splitting import sentence_bytes


def random_text(seed, newline):
    generator = random.Random(seed)
    parts = [
        "word é" * generator.randint(0, 8) + generator.choice(["\n", "\n\n", "\n \t\n", "\n\n\n"]) for _ in range(60)
    ]
    return "".join(parts).replace("\n", newline)


def found_in(units, options):
    """The sentences of every document, or why there are none."""
    items = [item for unit in units for piece in unit.pieces for item in read_documents(piece, options)]
    return [
        sentence_bytes(item.text, "lines").decode().split("\n") if isinstance(item, Document) else item.reason
        for item in items
    ]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("documents", ["blank-line", "line", "file"])
def test_cutting_a_file_changes_no_document(tmp_path, documents, newline):
    path = tmp_path / "a.txt"
    options = ReadOptions(documents)
    for seed in range(5):
        path.write_bytes(random_text(seed, newline).encode())
        size = path.stat().st_size
        expected = found_in(plan_units([str(path)], options, unit_bytes=size), options)
        for unit_bytes in (1, 7, 50, size - 1):
            units = plan_units([str(path)], options, unit_bytes)
            pieces = [piece for unit in units for piece in unit.pieces]
            assert [piece.start for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]
            assert pieces[-1].end == size
            assert all(unit.bytes for unit in units)
            assert found_in(units, options) == expected
        if documents != "file" and newline != "\r":
            assert len(plan_units([str(path)], options, 50)) > 3


def test_a_json_file_is_cut_between_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(100)))
    units = plan_units([str(path)], ReadOptions(), unit_bytes=300)
    assert len(units) > 5
    assert found_in(units, ReadOptions()) == [[f"document {i}"] for i in range(100)]


def test_small_files_share_a_unit_and_large_ones_have_their_own(tmp_path):
    sizes = {"a": 40, "b": 50, "c": 60, "empty": 0, "d": 350, "e": 10}
    for name, size in sizes.items():
        (tmp_path / f"{name}.txt").write_bytes(b"x" * 8 + b"\n\n" if size == 10 else b"xxxxxxxx\n\n" * (size // 10))
    units = plan_units([str(tmp_path / f"{name}.txt") for name in sizes], ReadOptions(), unit_bytes=100)
    assert [unit.index for unit in units] == list(range(len(units)))
    names = [[piece.path.removeprefix(f"{tmp_path}/")[:-4] for piece in unit.pieces] for unit in units]
    assert names == [["a", "b"], ["c", "empty"], ["d"], ["d"], ["d"], ["d"], ["e"]]
    assert [unit.bytes for unit in units] == [90, 60, 110, 100, 100, 40, 10]


def test_a_long_document_is_not_cut(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 500 + b"\n\n" + b"y" * 20)
    assert [unit.bytes for unit in plan_units([str(path)], ReadOptions(), unit_bytes=100)] == [502, 20]


def test_an_empty_corpus_is_an_error(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="empty"):
        plan_units([str(tmp_path / "a.txt")], ReadOptions())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in (
        "text/b.txt",
        "text/a/z.jsonl",
        "text/a.txt",
        "text/.hidden/c.txt",
        "text/README.md",
        "text/merges.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_is_read_recursively_and_sorted(folder):
    inputs = find_inputs(["text/"])
    assert inputs.files == ("text/a/z.jsonl", "text/a.txt", "text/b.txt")
    assert inputs.passed_over[IGNORED] == ("text/README.md",)
    assert inputs.notes() == [
        "ignored (hidden): text/.hidden",
        f"ignored (not {READABLE}): text/README.md",
        "ignored (files of tokenizers): text/merges.txt",
    ]


def test_globs_are_sorted_and_keep_the_order_of_arguments(folder):
    assert find_inputs(["text/b*", "text/**/*.jsonl"]).files == ("text/b.txt", "text/a/z.jsonl")


def test_a_file_given_twice_is_read_once(folder):
    inputs = find_inputs(["text/a.txt", "text", "./text/b.txt"])
    assert inputs.files == ("text/a.txt", "text/a/z.jsonl", "text/b.txt")
    assert inputs.passed_over[REPEATED] == ("text/a.txt", "text/b.txt")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("nothing.txt", "'nothing.txt'"),
        ("*.nothing", "no such file"),
        ("text/README.md", "convert or rename"),
        ("text/.hidden/../nodir", "nodir"),
        ("text/*.md", "contains no"),
    ],
)
def test_an_argument_that_names_no_text_is_an_error(folder, argument, message):
    with pytest.raises(UserError, match=message.replace("*", r"\*")):
        find_inputs(["text/a.txt", argument])


def test_a_name_before_a_path_is_its_source(folder):
    (folder / "year=2024").mkdir()
    (folder / "year=2024/c.txt").touch()
    inputs = find_inputs(["books=text/*.txt", "web=text/a/z.jsonl", "year=2024", "year=*/c.txt"])
    assert inputs.files == ("text/a.txt", "text/b.txt", "text/a/z.jsonl", "year=2024/c.txt")
    assert inputs.sources == {"text/a.txt": "books", "text/b.txt": "books", "text/a/z.jsonl": "web"}


def test_a_unit_has_one_source(tmp_path):
    paths = [str(tmp_path / f"{name}.txt") for name in "abcd"]
    for path in paths:
        Path(path).write_text("text")
    units = plan_units(paths, ReadOptions(), sources={paths[1]: "books", paths[2]: "books"})
    assert [[piece.source for piece in unit.pieces] for unit in units] == [[""], ["books", "books"], [""]]


def test_urls_are_files_folders_and_globs(tmp_path):
    system = fsspec.filesystem("memory")
    for name in ("b.txt", "a/c.jsonl.gz", "a/README.md"):
        system.pipe_file(f"/inputs/{name}", b"x")
    inputs = find_inputs(["s=memory://inputs"])
    assert inputs.files == ("memory:///inputs/a/c.jsonl.gz", "memory:///inputs/b.txt")
    assert inputs.passed_over[IGNORED] == ("memory:///inputs/a/README.md",)
    assert set(inputs.sources.values()) == {"s"}
    assert find_inputs(["memory://inputs/*.txt"]).files == ("memory:///inputs/b.txt",)
    assert find_inputs(["memory://inputs/b.txt"]).files == ("memory://inputs/b.txt",)
    (tmp_path / "a.txt").touch()
    assert find_inputs([f"file://{tmp_path}/a.txt"]).files == (f"{tmp_path}/a.txt",)
    for url in ("memory://inputs/none.txt", "nosuch://x/a.txt"):
        with pytest.raises(UserError, match=url):
            find_inputs([url])


def test_data_sets_are_the_files_that_the_library_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": [name] * 9}) for name in ("train", "test")})
    saved.save_to_disk("saved", num_shards={"train": 2, "test": 1})
    Path("saved/train/cache-1.arrow").touch()
    names = ("train/data-00000-of-00002", "train/data-00001-of-00002", "test/data-00000-of-00001")
    inputs = find_inputs(["saved"])
    assert inputs.files == tuple(f"saved/{name}.arrow" for name in names)
    assert found_in(plan_units(inputs.files, ReadOptions()), ReadOptions()) == [["train"]] * 9 + [["test"]] * 9

    for split in ("train", "validation"):
        saved["train"].to_parquet(f"hub/data/{split}-00000.parquet")
    assert [Path(file).name for file in dataset_files("./hub", None, "")] == ["train-00000.parquet"]
    assert [Path(file).name for file in dataset_files("./hub", None, "split=validation")] == [
        "validation-00000.parquet"
    ]
    for query, message in [("split=test", "no split 'test', only train, validation"), ("spilt=x", "only config")]:
        with pytest.raises(UserError, match=message):
            dataset_files("./hub", None, query)
