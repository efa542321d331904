"""The `preprocess` command as a user meets it."""

import json

import pytest

from ds_roberta.data.shards import Corpus
from ds_roberta.data.tokenizer import TokenizerInfo
from preprocessing import commands
from preprocessing.cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a text and a tokenizer trained on it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("\n\n".join(f"Document {i} has\ntwo lines." for i in range(50)))
    (tmp_path / "text/README.md").write_text("about the text")
    (tmp_path / "latin.txt").write_bytes(b"one\n\ncaf\xe9\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/precious").touch()
    assert run("train-tokenizer --input text --vocab_size 280 --output tok") == 0
    maskless = json.loads((tmp_path / "tok/tokenizer.json").read_text())
    del maskless["model"]["vocab"]["<mask>"]
    maskless["added_tokens"].pop()
    (tmp_path / "maskless").mkdir()
    (tmp_path / "maskless/tokenizer.json").write_text(json.dumps(maskless))
    return tmp_path


def run(line):
    with pytest.raises(SystemExit) as exit_:
        main(line.split())
    return exit_.value.code


def entries(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_two_commands_work_and_work_again(folder, capsys):
    for _ in range(2):
        assert run("train-tokenizer --input text --vocab_size 280 --output tok") == 0
        assert run("shard --input text --tokenizer tok --output data/corpus --workers 1 --validation_fraction 0.2") == 0
    output = capsys.readouterr().out
    assert "README.md" in output
    assert "50 read = 50 kept + 0 rejected, from 1 files" in output
    manifest = Corpus.open("data/corpus").manifest
    assert manifest.tokenizer == TokenizerInfo.read(folder / "tok")
    assert [entry.path for entry in manifest.inputs] == ["text/a.txt"]
    assert entries(folder / "data")[0] == "corpus"
    assert len(list((folder / "data").iterdir())) == 1


def test_a_text_too_small_for_the_vocabulary_says_so(folder, capsys):
    assert run("train-tokenizer --input text --vocab_size 5000 --output small") == 0
    size = TokenizerInfo.read(folder / "small").vocab_size
    assert size < 5000
    assert f"only {size} ids" in capsys.readouterr().out


def test_an_empty_validation_split_is_named_with_a_remedy(folder, capsys):
    assert run("shard --input text --tokenizer tok --output data --workers 1 --validation_fraction 0.000001") == 0
    assert "warning: none of 50 documents" in capsys.readouterr().err
    assert run("shard --input text --tokenizer tok --output data --workers 1 --validation_fraction 0") == 0
    assert "warning" not in capsys.readouterr().err


def test_prepared_data_in_a_folder_of_text_are_passed_over(folder, capsys):
    line = "shard --input text --tokenizer tok --output text/out --workers 1 --validation_fraction 0.2"
    assert run(line) == 0
    fingerprint = Corpus.open("text/out").manifest.fingerprint
    for again in (line, line.replace("text/out", "elsewhere")):
        capsys.readouterr()
        assert run(again) == 0
        assert "ignored (prepared data): text/out" in capsys.readouterr().out
    assert Corpus.open("text/out").manifest.fingerprint == fingerprint
    assert run(line.replace("--input text", "--input text/out")) == 2
    assert "'text/out' is prepared data, not text" in capsys.readouterr().err


def test_many_shards_of_prepared_data_are_passed_over_by_one_look_at_their_manifest(folder, capsys, monkeypatch):
    line = "shard --input text --tokenizer tok --output text/out --workers 1 --validation_fraction 0.2"
    assert run(line) == 0
    for number in range(20):
        (folder / f"text/out/train/shard-1{number:04d}.arrow").touch()
    asked, ask = [], commands.is_data_folder
    monkeypatch.setattr(commands, "is_data_folder", lambda folder: asked.append(str(folder)) or ask(folder))
    assert run(line) == 0
    assert "ignored (prepared data): text/out" in capsys.readouterr().out
    assert asked == ["text/out"]


SHARD = "shard --workers 1 --tokenizer tok --output out"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (f"{SHARD} --input missing.txt", "'missing.txt'"),
        (f"{SHARD} --input blank.txt", "empty"),
        (f"{SHARD} --input text --max_characters 5", "50 too_long"),
        (f"{SHARD} --input text --min_characters 9 --max_characters 5", "9 is above --max_characters 5"),
        (f"{SHARD} --input text --filter nosuch:f", "'nosuch:f'"),
        (f"{SHARD} --input text --max_bad_fraction 2", "--max_bad_fraction must be at least 0 and below 1, got 2.0"),
        (f"{SHARD} --input other", "'other'"),
        (f"{SHARD} --input text --validation_fraction 1", "got 1.0"),
        (f"{SHARD} --input text --validation_fraction nan", "got nan"),
        (f"{SHARD} --input text --workers 0", "'0'"),
        (f"{SHARD} --input text --workers 1.5", "'1.5'"),
        (f"{SHARD} --input text --documents page", "'page'"),
        (f"{SHARD} --input text --task 3/2", "'3/2'"),
        (f"{SHARD} --input text --task 0/2", "'0/2'"),
        (f"{SHARD} --input text --dedup fuzzy", "'fuzzy'"),
        ("shard --workers 1 --input text --tokenizer missing --output out", "'missing'"),
        ("shard --workers 1 --input text --tokenizer maskless --output out", "'maskless' has no <mask>"),
        ("shard --workers 1 --input text --tokenizer tok --output other", "other' is not empty"),
        ("shard --workers 1 --input text --tokenizer tok --output latin.txt", "latin.txt' is a file"),
        ("shard --workers 1 --input text --tokenizer tok --output latin.txt/out", "latin.txt/out' (Not a directory"),
        ("train-tokenizer --input text --vocab_size 260 --output out", "260"),
        ("train-tokenizer --input text --vocab_size -1 --output out", "'-1'"),
        ("train-tokenizer --input latin.txt --vocab_size 280 --output out", "line 3 (byte 5): byte 8"),
        ("train-tokenizer --input blank.txt --vocab_size 280 --output out", "empty"),
        ("train-tokenizer --input text --vocab_size 280 --output other", "other' is not empty"),
        ("train-tokenizer --input text --vocab 280", "--output"),
        ("train-tokenizer --input text --vocab_size 280 --output out --max_bad_fraction 2", "got 2.0"),
        (f"{SHARD} --input text --min_characters 0", "--min_characters must be a positive whole number, got 0"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder, capsys, line, named):
    before = entries(folder)
    capsys.readouterr()
    assert run(line) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert named in error
    assert entries(folder) == before


def test_tasks_and_slurm_arrays_share_the_work(folder, capsys, monkeypatch):
    line = "shard --input text --tokenizer tok --output data --workers 1 --validation_fraction 0.2"
    for name, value in {"ID": "4", "MIN": "3", "MAX": "4", "COUNT": "2", "STEP": "1"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert run(line) == 0
    output = capsys.readouterr().out
    assert "task 2 of 2 (from the SLURM array; --task 1/1 makes a whole output in each of its tasks)" in output
    assert "there are only 1 units for 2 tasks" in output
    assert not (folder / "data").exists()
    assert run(f"{line} --task 1/1") == 0
    assert Corpus.open("data").manifest.documents("train")


def test_workers_and_mpirun_exclude_each_other(folder, capsys, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert run(f"{SHARD} --input text") == 2
    assert "--workers 1 is for one machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "named", "remedy"),
    [
        ("latin.txt", "'latin.txt', line 3 (byte 5): byte 8", "iconv"),
        ("bad.jsonl", "'bad.jsonl', line 2 (byte 14)", "fix or remove the line"),
        ("other.jsonl", "'other.jsonl', line 1 (byte 0)", "--text_column"),
    ],
)
def test_too_many_bad_documents_end_the_job_and_a_higher_bound_resumes_it(folder, capsys, file, named, remedy):
    (folder / "other.jsonl").write_text('{"body": "text"}\n')
    capsys.readouterr()
    assert run(f"{SHARD} --input text {file}") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert named in error
    assert remedy in error
    assert "1 of 1 units are kept" in error
    assert not (folder / "out").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preprocessing.sharding.shard_unit", None)  # nothing is left to do
        assert run(f"{SHARD} --input text {file} --max_bad_fraction 0.5") == 0
    assert Corpus.open(folder / "out").manifest.inputs[1].rejected
    assert not (folder / ".out.partial").exists()
