"""Files of folders and globs: links are followed, loops end, and no text is skipped silently."""

import glob
import os

import datasets
import fsspec
import pytest

from ds_roberta.errors import UserError
from ds_roberta.inputs import paths
from ds_roberta.inputs.paths import HUB_DATASET, REPEATED, find_inputs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("text/a.txt", "text/sub/b.txt", "elsewhere/c.txt", "elsewhere/deep/d.txt", "text/sub/.e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def unreadable(monkeypatch):
    """A function that makes a folder unreadable (even for root, whom file modes do not stop)."""
    listdir = os.listdir

    def refuse(folder):
        def listing(path="."):
            if os.path.realpath(path) == os.path.realpath(folder):
                raise PermissionError(13, "Permission denied", path)
            return listdir(path)

        monkeypatch.setattr(os, "listdir", listing)

    return refuse


def test_links_to_folders_and_files_are_followed(folder):
    (folder / "text/link").symlink_to("../elsewhere")
    (folder / "text/file.txt").symlink_to("../elsewhere/c.txt")
    inputs = find_inputs(["text"])
    assert inputs.files == ("text/a.txt", "text/file.txt", "text/link/deep/d.txt", "text/sub/b.txt")
    assert inputs.passed_over[REPEATED] == ("text/link/c.txt",)
    assert find_inputs(["text/link"]).files == ("text/link/c.txt", "text/link/deep/d.txt")
    assert find_inputs(["text/**/d.*"]).files == ("text/link/deep/d.txt",)


def test_loops_of_links_end_and_a_file_keeps_its_own_path(folder):
    (folder / "text/0").symlink_to("sub")
    (folder / "text/again").symlink_to(".")
    (folder / "text/sub/up").symlink_to("..")
    (folder / "text/sub/up2").symlink_to("..")
    for argument in ("text", "text/**/*.txt"):
        assert find_inputs([argument]).files == ("text/a.txt", "text/sub/b.txt")
    assert sorted(map(os.path.basename, find_inputs(["text/**"]).files)) == ["a.txt", "b.txt"]
    notes = find_inputs(["text"]).notes()
    assert "read once, although given or linked more than once: text/0, text/again, text/sub/up, text/sub/up2" in notes
    assert "ignored (hidden): text/sub/.e.txt" in notes


def test_caches_of_a_saved_data_set_are_not_read(folder):
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk("text/saved")
    datasets.load_from_disk("text/saved").map(lambda row: {"text": row["text"].upper()})
    (cache,) = glob.glob("text/saved/cache-*.arrow")
    (data,) = glob.glob("text/saved/data-*.arrow")
    for argument in ("text", "text/**"):
        inputs = find_inputs([argument])
        assert [file for file in inputs.files if "saved" in file] == [data]
        assert f"ignored (caches of datasets): {cache}" in inputs.notes()


def test_a_saved_data_set_below_a_folder_has_only_the_files_that_it_names(folder):
    texts = datasets.Dataset.from_dict({"text": ["a", "b"]})
    texts.save_to_disk("text/one", num_shards=2)
    texts.save_to_disk("text/one")  # leaves the files of two
    datasets.DatasetDict(train=texts, test=texts).save_to_disk("text/two")
    datasets.DatasetDict(train=texts).save_to_disk("text/two")  # leaves the other split
    (folder / "text/sub/state.json").write_text("{}")  # of somebody's own
    (folder / "text/two/notes.txt").write_text("No data.")
    old = {"one/data-00000-of-00002.arrow", "one/data-00001-of-00002.arrow", "two/test/data-00000-of-00001.arrow"}
    names = ("a.txt", "one/data-00000-of-00001.arrow", "sub/b.txt", "two/train/data-00000-of-00001.arrow")
    for argument in ("text", "text/*"):
        inputs = find_inputs([argument])
        assert inputs.files == tuple(f"text/{name}" for name in names)
        others = inputs.passed_over["ignored (not named by the saved data set)"]
        assert set(others) == {f"text/{name}" for name in (*old, "two/notes.txt")}


def test_caches_next_to_a_downloaded_data_set_are_not_read(folder):
    (folder / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    loaded = datasets.load_dataset("json", data_files="rows.jsonl", split="train", cache_dir="cache")
    loaded.map(lambda row: {"text": row["text"].upper()})
    inputs = find_inputs(["cache"])
    assert [os.path.basename(file) for file in inputs.files] == ["json-train.arrow"]
    assert any(note.startswith("ignored (caches of datasets): cache/json/") for note in inputs.notes())


def test_a_remote_folder_is_read_like_a_local_one(folder):
    memory = fsspec.filesystem("memory")
    for name in ("a.txt", ".hidden.txt", ".checkpoints/b.txt", "sub/c.txt"):
        memory.pipe(f"/remote/{name}", b"text")
    try:
        inputs = find_inputs(["memory://remote", "memory://remote/a.txt", f"local://{folder}/text", "text"])
    finally:
        memory.rm("/remote", recursive=True)
    remote, local = inputs.files[:2], inputs.files[2:]
    assert remote == ("memory:///remote/a.txt", "memory:///remote/sub/c.txt")
    assert local == (f"{folder}/text/a.txt", f"{folder}/text/sub/b.txt")
    assert inputs.passed_over["ignored (hidden)"][:2] == ("/remote/.checkpoints/b.txt", "/remote/.hidden.txt")
    assert "memory://remote/a.txt" in inputs.passed_over[REPEATED]


def test_a_tokenizer_next_to_the_text_is_not_read(folder):
    (folder / "text/merges.txt").touch()
    (folder / "text/tokenizer.json").touch()
    notes = find_inputs(["text"]).notes()
    assert "ignored (files of tokenizers): text/merges.txt" in notes
    assert f"{paths.IGNORED}: text/tokenizer.json" in notes
    assert find_inputs(["text/merges.txt"]).files == ("text/merges.txt",)  # of somebody who asks for it


def test_a_url_within_another_is_refused(folder):
    for url in (
        "zip://*.jsonl::file:///a.zip",
        "zip://b.jsonl::file:///gone.zip",
        f"simplecache::file://{folder}/text",
    ):
        with pytest.raises(UserError, match="are not opened; unpack or copy the files"):
            find_inputs([url])


@pytest.mark.parametrize("argument", ["text", "text/*.jsonl", "text/**/*.jsonl", "tex*"])
def test_a_broken_link_with_the_name_of_a_text_is_an_error(folder, argument):
    (folder / "text/gone.jsonl").symlink_to("../nowhere.jsonl")
    with pytest.raises(UserError, match=r"'text/gone\.jsonl' is a broken link"):
        find_inputs([argument])


def test_other_broken_links_and_pipes_are_named(folder):
    (folder / "text/gone").symlink_to("../nowhere")
    (folder / "text/self").symlink_to("self")
    os.mkfifo("text/pipe.txt")
    for argument in ("text", "text/**", "text/*"):
        inputs = find_inputs([argument])
        assert inputs.files == ("text/a.txt", "text/sub/b.txt")
        assert "ignored (broken links): text/gone, text/self" in inputs.notes()
        assert "ignored (neither files nor folders): text/pipe.txt" in inputs.notes()
    with pytest.raises(UserError, match=r"'text/pipe\.txt': it is neither a file nor a folder"):
        find_inputs(["text/pipe.txt"])
    with pytest.raises(UserError, match="a broken link: 'text/gone'"):
        find_inputs(["text/gone"])


@pytest.mark.parametrize("argument", ["text", "text/**/*.txt", "t*", "text/*/*.txt", "text/sub/*"])
def test_a_folder_that_cannot_be_read_is_named_in_an_error(folder, unreadable, argument):
    unreadable("text/sub")
    with pytest.raises(UserError, match="cannot read 'text/sub': Permission denied"):
        find_inputs([argument])


def test_a_name_that_is_not_utf_8_is_an_error_only_if_it_would_be_read(folder):
    name = os.fsdecode(b"text/caf\xe9.")
    (folder / f"{name}md").touch()
    assert find_inputs(["text"]).notes()[-1].endswith(r": 'text/caf\udce9.md'")
    (folder / f"{name}txt").touch()
    for argument in ("text", "text/*", f"{name}txt"):
        with pytest.raises(UserError, match=r"'text/caf\\udce9\.txt' is not UTF-8.*: rename"):
            find_inputs([argument])


@pytest.mark.parametrize(
    "pattern",
    [
        "*",
        "**",
        "**/*",
        "text/**/*.txt",
        "*/sub/*",
        "*/*/",
        "text/[a-b].txt",
        "text/sub/.*",
        "te?t/**/sub/*.txt",
        "*/a.*",
    ],
)
def test_globs_find_what_the_standard_library_finds(folder, pattern):
    expected = {path for path in glob.glob(pattern, recursive=True) if path.endswith(".txt") or os.path.isdir(path)}
    files = {path for path in expected if not os.path.isdir(path)}
    for path in expected - files:  # folders stand for all in them
        files |= set(find_inputs([path]).files)
    assert set(find_inputs([pattern]).files) == {os.path.normpath(path) for path in files}
    absolute = find_inputs([os.path.join(os.getcwd(), pattern)]).files
    assert {os.path.relpath(path) for path in absolute} == {os.path.normpath(path) for path in files}


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("me/hub", ("me/hub", None, "")),
        ("hub@v1.0?split=test", ("hub", "v1.0", "split=test")),
        ("me/hub@refs/convert/parquet?config=a", ("me/hub", "refs/convert/parquet", "config=a")),
        ("me/hub@refs/pr/12", ("me/hub", "refs/pr/12", "")),
    ],
)
def test_a_data_set_may_be_asked_for_by_its_revision(monkeypatch, url, asked):
    found = []
    monkeypatch.setattr(paths, "dataset_files", lambda *arguments: found.append(arguments) or ["a.parquet"])
    find_inputs([f"hf://datasets/{url}"])
    assert found == [asked]


def test_a_file_of_a_revision_is_no_data_set():
    assert not HUB_DATASET.fullmatch("hf://datasets/me/hub@refs/convert/parquet/default/train/0000.parquet")
