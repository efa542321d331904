import contextlib
import errno
import json
import os
import resource
import shutil
import stat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch
import xxhash
from tokenizers import Tokenizer, models

from ds_roberta import files, lease
from ds_roberta.errors import DiskError, UserError, disk_refusal
from ds_roberta.files import (
    append_line,
    atomic_path,
    errors_of_the_disk,
    file_checksum,
    is_within,
    json_fingerprint,
    read_json,
    replaced_folder,
    save_array,
    write_json,
)
from ds_roberta.lease import LeaseHeld


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def write():
        with atomic_path(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_json_survives_writing(tmp_path):
    value = {"name": "Grüße", "list": [1, 2.5, None]}
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"set": {1}})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value
    assert names(tmp_path) == ["a.json"]


def test_fingerprints_ignore_the_order_of_keys_alone():
    assert json_fingerprint({"a": 1, "b": [1, 2]}) == json_fingerprint({"b": [1, 2], "a": 1})
    values = [{"a": 1, "b": [2, 1]}, {"a": 1}, {"a": "1"}, {"a": 1.5}, {"ä": 1}, [1, 2], [2, 1]]
    assert len({json_fingerprint(value) for value in values}) == len(values)
    assert len(json_fingerprint({})) == 32


def test_fingerprints_never_change_silently():
    assert json_fingerprint({"b": [1, 0.5, None, True], "a": "ü"}) == "aa35b52aedec01f6f148be5c7c02e169"


def test_a_files_checksum_is_of_all_its_bytes(tmp_path):
    content = b"0123456789" * 300_000
    (tmp_path / "file").write_bytes(content)
    assert file_checksum(tmp_path / "file") == xxhash.xxh3_128_hexdigest(content)


def is_ours(folder):
    return not (folder / "theirs").exists()


def test_a_folder_of_another_kind_is_refused_and_stays(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/theirs").write_text("")
    with (
        pytest.raises(UserError, match="not empty and not one of ours"),
        replaced_folder(tmp_path / "a", is_ours, "one of ours"),
    ):
        pytest.fail("it must not be replaced")
    assert names(tmp_path / "a") == ["theirs"]


def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "a")
    with (
        pytest.raises(UserError, match="a mount point, which cannot be replaced: choose a folder in it"),
        replaced_folder(tmp_path / "a", is_ours, "one of ours"),
    ):
        pytest.fail("it cannot be replaced")


def test_a_directory_takes_the_place_of_the_old_one_whole(tmp_path):
    target = tmp_path / "a/b"
    for content in ("first", "second"):
        with replaced_folder(target, is_ours, "one of ours") as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / content).write_text(content)
        assert names(target / "deep") == [content]
        assert names(target.parent) == ["b"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_directory(tmp_path, error):
    with replaced_folder(tmp_path / "a", is_ours, "one of ours") as temporary:
        (temporary / "file").write_text("old")

    def replace():
        with replaced_folder(tmp_path / "a", is_ours, "one of ours") as temporary:
            (temporary / "file").write_text("new")
            raise error

    with pytest.raises(error):
        replace()
    assert (tmp_path / "a/file").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_failure_between_the_two_renames_leaves_the_old_directory(tmp_path):
    with replaced_folder(tmp_path / "a", is_ours, "one of ours") as temporary:
        (temporary / "file").write_text("old")
    with (
        pytest.raises(UserError, match="cannot write"),
        replaced_folder(tmp_path / "a", is_ours, "one of ours") as temporary,
    ):
        temporary.rmdir()  # there is nothing to put into the old one's place
    assert (tmp_path / "a/file").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_killed_replacement_is_cleared_by_the_next(tmp_path):
    (tmp_path / ".a.partial").mkdir()  # what such a kill leaves
    (tmp_path / ".a.partial/half").write_text("")
    with replaced_folder(tmp_path / "a", is_ours, "one of ours") as temporary:
        assert names(temporary) == []
        (temporary / "file").write_text("")
    assert names(tmp_path / "a") == ["file"]
    assert names(tmp_path) == ["a"]


def test_a_folder_that_another_job_writes_is_refused_and_not_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_PATIENCE_SECONDS", 0.0)
    with replaced_folder(tmp_path / "a", is_ours, "one of ours") as temporary:
        (temporary / "file").write_text("first")
        with (
            pytest.raises(LeaseHeld, match=r"another job is writing '.*/a': process \d+"),
            replaced_folder(tmp_path / "a", is_ours, "one of ours"),
        ):
            pytest.fail("two jobs write one folder")
    assert (tmp_path / "a/file").read_text() == "first"
    assert names(tmp_path) == ["a"]


def test_a_lease_is_taken_though_a_job_that_ends_removes_its_folder(tmp_path, monkeypatch):
    mkdir, removed = Path.mkdir, []

    def made_and_removed_once(path, *arguments, **options):
        mkdir(path, *arguments, **options)
        if path.name == ".a.leases" and not removed:
            removed.append(path)
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", made_and_removed_once)
    with lease.sole_writer(tmp_path / "a", lease.leases_folder(tmp_path / "a")):
        assert len(names(tmp_path / ".a.leases")) == 1
    assert removed
    assert names(tmp_path) == []


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    with replaced_folder(tmp_path / "a", is_ours, "one of ours") as temporary:
        (temporary / "file").write_text("old")
    (tmp_path / "a").rename(tmp_path / ".a.old")  # what such a kill leaves

    def fail():
        with replaced_folder(tmp_path / "a", is_ours, "one of ours"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "a/file").read_text() == "old"


def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"cannot write .*fix this or choose another output"),
        replaced_folder(tmp_path / "file/a", is_ours, "one of ours"),
    ):
        pytest.fail("there is nothing to write to")


@contextlib.contextmanager
def files_of_at_most(size):
    """The operating system refuses to let a file grow further, as on a full disk or over a quota."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def write_arrow(path):
    table = pa.table({"a": np.arange(10_000)})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def test_a_file_that_torch_may_not_make_is_refused_by_the_disk_and_a_missing_folder_is_not(tmp_path):
    with pytest.raises(RuntimeError) as caught:
        torch.save({}, tmp_path / ("x" * 300))
    assert disk_refusal(caught.value) == "File name too long"
    text = str(caught.value).replace("File name too long", "No such file or directory")
    assert disk_refusal(RuntimeError(text)) is None


def test_an_array_is_written_whole_or_refused(tmp_path):
    array = np.arange(1000)

    def write(name):
        with (tmp_path / name).open("wb") as file:
            save_array(file, array)

    write("whole")
    assert np.array_equal(np.load(tmp_path / "whole"), array)
    with files_of_at_most((tmp_path / "whole").stat().st_size - 1), pytest.raises(OSError, match="File too large"):
        write("cut")


@pytest.mark.parametrize("size", [0, 4096])
@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("x" * 10_000),
        lambda path: write_json(path, ["x" * 10_000]),
        lambda path: shutil.copytree(path.parents[1] / "source", path),
        lambda path: safetensors.torch.save_file({"a": torch.zeros(10_000)}, path),
        lambda path: torch.save({"a": torch.zeros(10_000)}, path),
        lambda path: np.save(path, np.zeros(10_000)),
        lambda path: np.zeros(10_000).tofile(path),
        lambda path: Tokenizer(models.BPE({str(number): number for number in range(1000)}, [])).save(str(path)),
        write_arrow,
    ],
    ids=["text", "json", "copy", "safetensors", "torch", "numpy", "tofile", "tokenizer", "arrow"],
)
def test_a_full_disk_is_a_user_error_whatever_writes_and_leaves_what_was_there(tmp_path, write, size):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/file").write_bytes(bytes(10_000))
    with replaced_folder(tmp_path / "a", is_ours, "one of ours") as temporary:
        (temporary / "file").write_text("old")
    with (
        files_of_at_most(size),
        pytest.raises(DiskError, match=r"cannot write '.*/a' \(.*fix this or choose another output") as caught,
        replaced_folder(tmp_path / "a", is_ours, "one of ours") as temporary,
    ):
        write(temporary / "file")
    assert disk_refusal(caught.value.__cause__)  # it is known wherever it is met
    assert (tmp_path / "a/file").read_text() == "old"
    assert names(tmp_path) == ["a", "source"]


def test_errors_that_no_disk_made_stay_what_they_are():
    for error in (UserError("wrong"), RuntimeError("of the program")):
        with pytest.raises(type(error)) as caught, errors_of_the_disk("a"):
            raise error
        assert caught.value is error


def test_what_standard_output_refuses_is_not_the_files_fault(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full, os.fdopen(writing, "w") as closed:
        for stream, error in ((full, OSError), (closed, BrokenPipeError)):
            monkeypatch.setattr("sys.stdout", stream)
            with pytest.raises(error) as caught, errors_of_the_disk("a"):
                print("lost", flush=True)
            assert not isinstance(caught.value, UserError)
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_cannot_be_made_durable_is_not_there(tmp_path, monkeypatch, replaced):
    if replaced:
        with replaced_folder(tmp_path / "a", is_ours, "one of ours") as temporary:
            (temporary / "file").write_text("old")

    def refuse(folder):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))

    monkeypatch.setattr(files, "sync_directory", refuse)
    with (
        pytest.raises(UserError, match="Input/output error"),
        replaced_folder(tmp_path / "a", is_ours, "one of ours") as temporary,
    ):
        (temporary / "file").write_text("new")
    assert names(tmp_path) == ["a"] * replaced
    assert not replaced or (tmp_path / "a/file").read_text() == "old"


@pytest.mark.parametrize("room", [0, 7, 10])
def test_a_line_is_appended_whole_or_not_at_all(tmp_path, room):
    path = tmp_path / "file"
    append_line(path, "the first")
    with files_of_at_most(10 + room):
        if room < 10:
            with pytest.raises(OSError, match="too large"):
                append_line(path, "a zweite")
            assert path.read_text() == "the first\n"
        else:
            append_line(path, "a zweite")
    append_line(path, "größer")
    assert path.read_text(encoding="utf-8").splitlines()[-1] == "größer"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_every_file_and_folder_honours_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        for _ in range(2):  # the second replaces the first
            with replaced_folder(tmp_path / "new/a", is_ours, "one of ours") as temporary:
                (temporary / "deep").mkdir()
                safetensors.torch.save_file({"a": torch.zeros(1)}, temporary / "deep/weights")
                write_json(temporary / "file", {})
        append_line(tmp_path / "new/lines", "")
    finally:
        os.umask(before)
    found = {path.relative_to(tmp_path): stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").rglob("*")}
    assert len(found) == 5
    for path, mode in found.items():
        assert oct(mode) == oct((0o777 if (tmp_path / path).is_dir() else 0o666) & ~mask), path


@pytest.mark.parametrize(
    ("name", "within"),
    [
        ("a", True),
        ("a/b", True),
        ("a..b", True),
        ("", False),
        ("..", False),
        ("a/../b", False),
        ("/a", False),
        ("\ud800", False),
    ],
)
def test_names_that_leave_a_folder(name, within):
    assert is_within(name) == within


def test_a_fingerprint_takes_every_value_of_json(tmp_path):
    (tmp_path / "a.json").write_text('{"a": "\\ud800", "b": NaN}')
    assert len(json_fingerprint(read_json(tmp_path / "a.json"))) == 32


@pytest.mark.parametrize("content", ["[" * 100_000, "9" * 5000, ""])
def test_what_no_parser_reads_is_a_user_error(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a.json' is not JSON .*: fix or remove it"):
        read_json(tmp_path / "a.json")
