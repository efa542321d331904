"""Checkpoints without DeepSpeed: a stand-in engine of a small module, its processes played by threads."""

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from fake_engine import IDENTITY, FakeEngine, equal
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ds_roberta.config import model_config
from ds_roberta.errors import UserError
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.training import checkpoint
from ds_roberta.training.checkpoint import TrainState
from ds_roberta.training.checkpoint_writer import CheckpointWriter, Retention, remove
from ds_roberta.training.export import export_checkpoint
from ds_roberta.training.initial_model import InitialModel


@pytest.fixture
def save(tokenizer_folder, on_ranks):
    """A function that saves a checkpoint of a step with any number of processes, and returns its folder."""

    def save_step(folder, step, world_size=2, keep_last=10, **state):
        def body(ranks):
            with CheckpointWriter(
                FakeEngine(ranks, seed=step), tokenizer_folder, folder, Retention(keep_last)
            ) as writer:
                return writer.save(TrainState(IDENTITY, step, **state))

        results = on_ranks(world_size, body)
        for result in results:
            if isinstance(result, Exception):
                raise result
        assert len(set(results)) == 1
        return results[0]

    return save_step


def flip(path, offset=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if offset is None else offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("saved_by", [1, 2, 3])
def test_a_checkpoint_of_any_number_of_processes_loads_with_any_other(tmp_path, save, on_ranks, saved_by):
    state = {
        "consumed_samples": 80,
        "consumed_tokens": 999,
        "skipped_steps": 2,
        "loss_scaler": {"cur_scale": 1024.0, "cur_iter": 10},
    }
    path = save(tmp_path, 10, saved_by, **state)
    checkpoint.verify(path)
    assert len(list(path.glob("state-*.safetensors"))) == saved_by
    expected = FakeEngine(None, seed=10).content()

    def load(ranks):
        engine = FakeEngine(ranks, seed=77)
        loaded = checkpoint.load(engine, path)
        return loaded, engine.content(), engine.applied_steps, engine.loss_scaler_state

    for loaded, content, applied_steps, loss_scaler in on_ranks(2, load):
        assert loaded == TrainState(IDENTITY, 10, **state)
        assert equal(content, expected)
        assert applied_steps == 8
        assert loss_scaler == state["loss_scaler"]


def test_weights_are_fp32_by_parameter_name(tmp_path, save):
    path = save(tmp_path, 5)
    expected = dict(FakeEngine(None, seed=5).module.named_parameters())
    weights = checkpoint.weights(path)
    assert equal(weights, {name: parameter.data for name, parameter in expected.items()})
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_processes_share_the_writing(tmp_path, save):
    path = save(tmp_path, 1, world_size=2)
    keys, sizes = [], []
    for file in sorted(path.glob("state-*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            keys.append(set(stored.keys()))
            sizes.append(sum(stored.get_tensor(key).numel() for key in stored.keys()))  # noqa: SIM118
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == 3 * 6
    # No process has more than the largest tensor above the other.
    assert abs(sizes[0] - sizes[1]) <= 3 * 36


def test_any_damage_to_any_file_is_noticed_and_auto_falls_back_to_the_earlier_one(tmp_path, save):
    earlier = save(tmp_path / "run", 2)
    original = save(tmp_path / "c", 3)
    files = sorted(str(path.relative_to(original)) for path in original.rglob("*") if path.is_file())
    assert {"manifest.json", "train_state.json", "tokenizer/tokenizer.json"} < set(files)
    assert sum(name.startswith("state-") for name in files) == 2
    damages = [
        lambda path: flip(path, 0),
        lambda path: flip(path),
        lambda path: flip(path, -1),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(path.read_bytes()[:-2]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ]
    for name in files:
        for damage in damages:
            copy = tmp_path / "run/global_step3"
            shutil.copytree(original, copy)
            assert checkpoint.choose("auto", tmp_path / "run") == copy
            damage(copy / name)
            with pytest.raises(UserError, match="checkpoint"):
                checkpoint.choose(str(copy), tmp_path / "run")
            assert checkpoint.choose("auto", tmp_path / "run") == earlier
            shutil.rmtree(copy)


def test_a_flipped_bit_anywhere_in_the_manifest_is_noticed(tmp_path, save):
    path = save(tmp_path, 3) / "manifest.json"
    content = path.read_bytes()
    for offset in range(len(content)):
        path.write_bytes(content)
        flip(path, offset)
        with pytest.raises(UserError):
            checkpoint.verify(path.parent)


def test_weights_that_the_manifest_does_not_name_are_noticed(tmp_path, save):
    path = save(tmp_path, 3)
    shutil.copy(path / "state-00000-of-00002.safetensors", path / "state-00000-of-00001.safetensors")
    with pytest.raises(UserError, match=r"does not name its file 'state-00000-of-00001.safetensors'"):
        checkpoint.verify(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["weight.0.bias", "exp_avg_sq.0.bias"])
def test_a_checkpoint_that_is_not_finite_is_passed_over(tmp_path, save, key, value):
    """An earlier version could write such a checkpoint: its checksums are right."""
    earlier, path = save(tmp_path, 2), save(tmp_path, 3)
    (file,) = (file for file in path.glob("state-*.safetensors") if key in load_file(file))
    tensors = load_file(file)
    tensors[key][-1] = value
    save_file(tensors, file)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][file.name] = checkpoint.file_entry(file)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"diverged: '{key}' is not finite; resume from an earlier one"):
        checkpoint.choose(str(path), tmp_path)
    assert checkpoint.choose("auto", tmp_path) == earlier


@pytest.mark.parametrize("content", ["[]", "null", '{"format_version": 1}', '{"format_version": 1, "files": 3}'])
def test_a_manifest_of_another_kind_is_a_user_error(tmp_path, save, content):
    path = save(tmp_path, 3)
    (path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest of the checkpoint .* is damaged"):
        checkpoint.verify(path)


def test_another_format_version_is_refused_by_name(tmp_path, save):
    path = save(tmp_path, 3)
    (path / "manifest.json").write_text(json.dumps({"format_version": 9, "parts": []}))
    with pytest.raises(UserError, match="format version 9, but this program reads 1"):
        checkpoint.verify(path)


def test_a_folder_that_is_no_checkpoint_says_what_to_name(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"cat")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "photos"):
        with pytest.raises(UserError, match=r"is not a checkpoint .* name a folder checkpoints/global_stepN of a run"):
            checkpoint.choose(str(path), tmp_path / "none")


def test_a_checkpoint_from_before_the_best_was_remembered_loads(tmp_path, save):
    path = save(tmp_path, 3, best_eval_loss=2.5, best_step=3)
    content = json.loads((path / "train_state.json").read_text())
    del content["best_eval_loss"], content["best_step"]
    (path / "train_state.json").write_text(json.dumps(content))
    assert checkpoint.read_state(path) == TrainState(IDENTITY, 3)


@pytest.mark.parametrize(
    ("name", "before", "now", "are_forgotten"),
    [
        *((name, 8, 8, True) for name in ("data", "tokenizer", "packing", "masking", "attention")),
        ("seed", 8, 8, False),
        ("seed", 8, 16, True),
        ("seed", 0, 16, False),  # an earlier version's checkpoint does not say of how many sequences its losses are
    ],
)
def test_losses_of_another_held_out_sample_are_forgotten(name, before, now, are_forgotten):
    losses = {"best_eval_loss": 2.0, "best_step": 5, "lines": {"unigram_loss": 7.0}}
    losses |= {"recent_evaluations": [[5, 2.0]], "plateau": "unigram"}
    state, identity = TrainState(IDENTITY, 9, eval_sequences=before, **losses), {**IDENTITY, name: "another"}
    assert state.continue_as(identity, now) == are_forgotten
    assert state == TrainState(identity, 9, eval_sequences=now, **({} if are_forgotten else losses))


def test_auto_takes_the_newest_by_number(tmp_path, save):
    assert checkpoint.choose("auto", tmp_path / "none") is None
    assert checkpoint.choose("auto", tmp_path) is None
    for step in (9, 10, 100):
        save(tmp_path, step)
    (tmp_path / "latest").write_text("global_step9\n")  # a run killed before it renamed `latest`
    (tmp_path / ".global_step200.tmp").mkdir()  # a run killed while it wrote
    (tmp_path / "global_step300_old").mkdir()  # a person's copy
    assert checkpoint.choose("auto", tmp_path) == tmp_path / "global_step100"


def test_auto_passes_over_damaged_ones_and_says_so(tmp_path, save, caplog):
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip(tmp_path / "global_step3/state-00001-of-00002.safetensors")
    (tmp_path / "global_step2/manifest.json").unlink()
    with caplog.at_level("WARNING", logger="ds_roberta"):
        assert checkpoint.choose("auto", tmp_path) == tmp_path / "global_step1"
    assert ["state-00001" in record.message for record in caplog.records] == [True, False]
    assert all("skipped" in record.message for record in caplog.records)


def test_auto_never_starts_again_over_damaged_checkpoints(tmp_path, save):
    flip(save(tmp_path, 1) / "train_state.json")
    with pytest.raises(UserError, match=r"no checkpoint .* is complete: move them away to start over"):
        checkpoint.choose("auto", tmp_path)


def test_a_named_checkpoint_is_taken_or_refused_and_never_another(tmp_path, save):
    save(tmp_path, 1)
    second = save(tmp_path, 2)
    assert checkpoint.choose(str(tmp_path / "global_step1"), tmp_path) == tmp_path / "global_step1"
    flip(second / "train_state.json")
    with pytest.raises(UserError, match=r"train_state.json' is damaged"):
        checkpoint.choose(str(second), tmp_path)
    with pytest.raises(UserError, match="is not a checkpoint"):
        checkpoint.choose(str(tmp_path / "global_step7"), tmp_path)


def test_the_newest_of_a_run_is_found_from_its_folder(tmp_path, save):
    folder = tmp_path / checkpoint.CHECKPOINTS_FOLDER
    first = save(folder, 1)
    second = save(folder, 2)
    assert checkpoint.newest(tmp_path) == second
    flip(second / "train_state.json")
    assert checkpoint.newest(tmp_path) == first
    assert checkpoint.newest(first) == first
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.newest(second)
    (tmp_path / "empty" / checkpoint.CHECKPOINTS_FOLDER).mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.newest(tmp_path / "empty")


def test_a_checkpoint_exports_by_itself(tmp_path, tokenizer_folder, solo_ranks):
    config = model_config("nano", 400, 64)
    engine = FakeEngine(solo_ranks, module=MaskedLM(config))
    identity = {"model": vars(config), "packing": {"max_seq_length": 64}}
    folder = tmp_path / "run" / checkpoint.CHECKPOINTS_FOLDER
    with CheckpointWriter(engine, tokenizer_folder, folder, Retention(3)) as writer:
        path = writer.save(TrainState(identity, 7, best_step=7))
        writer.save(TrainState(identity, 8, best_step=7))
    assert checkpoint.newest(tmp_path / "run") != path
    for source, best in ((path, False), (tmp_path / "run", False), (tmp_path / "run", True)):
        export_checkpoint(source, tmp_path / "exported", best)
        assert json.loads((tmp_path / "exported/tokenizer_config.json").read_text())["model_max_length"] == 64
        assert f"| steps | {8 if source != path and not best else 7} |" in (tmp_path / "exported/README.md").read_text()
    flip(path / "tokenizer/tokenizer.json")
    for source, best in ((path, False), (tmp_path / "run", True)):
        with pytest.raises(UserError, match=r"tokenizer.json' is damaged"):
            export_checkpoint(source, tmp_path / "other", best)
        assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match=r"cannot read .*checkpoints/best'"):
        export_checkpoint(path, tmp_path / "other", best=True)


def signed(path):
    """Give the manifest the sizes and checksums of changed files."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {name: checkpoint.file_entry(path / name) for name in manifest["files"]}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../elsewhere", "/elsewhere", "tokenizer/../../elsewhere"])
def test_a_manifest_names_no_file_elsewhere(tmp_path, save, name):
    path = save(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 0, "checksum": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"names {name!r}, outside of it"):
        checkpoint.verify(path)


@pytest.mark.parametrize("name", ["../global_step3", "/global_step3", "global_step3/..", "", "\ufffd"])
def test_the_best_is_a_checkpoint_of_the_same_run(tmp_path, save, name):
    folder = tmp_path / checkpoint.CHECKPOINTS_FOLDER
    save(folder, 3)
    (folder / "best").write_text(name)
    with pytest.raises(UserError, match="not the name of a checkpoint beside it"):
        checkpoint.best(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 100_000,
        "{}",
        '{"identity": 3}',
        '{"identity": {}, "global_step": "3"}',
        '{"identity": {}, "consumed_tokens": 1.5}',
    ],
)
def test_a_state_of_another_form_is_a_user_error(tmp_path, save, content):
    path = save(tmp_path, 3)
    (path / "train_state.json").write_text(content)
    signed(path)
    with pytest.raises(UserError, match=r"checkpoint .* is damaged .*: choose another"):
        checkpoint.read_state(path)


@pytest.mark.parametrize(
    "identity", [{}, {"model": 3}, {"model": {}, "packing": {}}, {"packing": {"max_seq_length": "a"}}]
)
def test_an_identity_of_another_form_is_a_user_error(tmp_path, save, identity):
    path = save(tmp_path, 3)
    (path / "train_state.json").write_text(json.dumps({"identity": identity}))
    signed(path)
    with pytest.raises(UserError, match=r"checkpoint .* is damaged .*: choose another"):
        export_checkpoint(path, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("field", "value"), [("num_attention_heads", {"a": [{}]}), ("pad_token_id", 10**6), ("hidden_size", 0.5)]
)
def test_the_architecture_of_a_checkpoint_is_not_believed(tmp_path, save, field, value):
    path = save(tmp_path, 3)
    state = json.loads((path / "train_state.json").read_text())
    state["identity"]["model"] = dataclasses.asdict(model_config("tiny", 400, 16)) | {field: value}
    (path / "train_state.json").write_text(json.dumps(state))
    signed(path)
    for reader in (InitialModel.open, lambda path: export_checkpoint(path, tmp_path / "exported")):
        with pytest.raises(UserError, match=rf"train_state.json': {field} "):
            reader(path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100])
def test_weights_of_another_form_are_a_user_error(tmp_path, save, content):
    path = save(tmp_path, 3)
    file = min(path.glob("state-*.safetensors"))
    file.write_bytes(content)
    signed(path)
    with pytest.raises(UserError, match=r"cannot read the checkpoint file .*state-"):
        checkpoint.verify(path)
    save_file({"weight": torch.zeros(1)}, file)  # of no parameter
    signed(path)
    with pytest.raises(UserError, match=r"cannot read the checkpoint file .*state-"):
        checkpoint.verify(path)


def test_the_best_is_the_step_that_the_newest_checkpoint_names_or_none(tmp_path, save):
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        save(folder, step, best_step=min(step, 2), best_eval_loss=2.0)
    assert checkpoint.best(tmp_path).name == "global_step2"
    for damaged in ("global_step1", "global_step3", "global_step8", "/lobal_step2", "", "global_step\xff"):
        (folder / "best").write_bytes(damaged.encode("latin1"))
        with pytest.raises(UserError, match=r"best step is 2|global_step8|not the name"):
            checkpoint.best(tmp_path)


def test_a_checkpoint_that_cannot_be_removed_is_named_and_the_others_go(tmp_path, monkeypatch, caplog):
    rename = Path.rename

    def refused(path, target):
        if path.name == "global_step1":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return rename(path, target)

    for step in (1, 2, 3):
        (tmp_path / f"global_step{step}").mkdir()
    monkeypatch.setattr(Path, "rename", refused)
    remove(tmp_path, [1, 2])
    assert checkpoint.saved_steps(tmp_path) == [3, 1]
    (message,) = caplog.messages
    assert "cannot remove the checkpoint" in message
    assert "global_step1'" in message
