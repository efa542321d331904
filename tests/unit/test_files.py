import json

import pytest
import xxhash

from ds_roberta.errors import UserError
from ds_roberta.files import atomic_path, file_checksum, json_fingerprint, replaced_folder, write_json


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
    replacement = replaced_folder(tmp_path / "a", is_ours, "one of ours")
    (replacement.__enter__() / "half").write_text("")
    with replaced_folder(tmp_path / "a", is_ours, "one of ours") as temporary:
        assert names(temporary) == []
        (temporary / "file").write_text("")
    assert names(tmp_path / "a") == ["file"]
    assert names(tmp_path) == ["a"]


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
        pytest.raises(UserError, match=r"cannot write .*give another --output"),
        replaced_folder(tmp_path / "file/a", is_ours, "one of ours"),
    ):
        pytest.fail("there is nothing to write to")
