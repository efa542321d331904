"""Fine-tuning by Trainer: it learns, a stopped one ends as the unbroken one, and metrics are scikit-learn's."""

import json
import logging
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from ds_roberta.distributed import StopRequest
from ds_roberta.errors import UserError
from ds_roberta.finetuning.classification import Classification
from ds_roberta.finetuning.finetune import STOPPED_EXIT_CODE, FinetuneConfig, finetune
from ds_roberta.finetuning.one_run import Recipe, Setting
from ds_roberta.finetuning.question_answering import SpanOptions
from ds_roberta.finetuning.task import RESULTS

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Trainer's


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts labelled by whether they contain a word; the test split is the validation split."""
    rng = random.Random(0)
    rows = []
    for _ in range(80):
        words = [rng.choice(["karen", "sulto", "minka", "shendu"]) for _ in range(6)]
        label = rng.randrange(2)
        if label:
            words[rng.randrange(6)] = "vorpali"
        rows.append(json.dumps({"text": " ".join(words), "label": label}))
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.jsonl").write_text("\n".join(rows[:64]))
    for split in ("dev", "dev_mismatched", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(rows[64:]))
    return folder


@pytest.fixture
def config(roberta_folder, data, tmp_path):
    return FinetuneConfig(
        model=roberta_folder,
        task="classification",
        data=(str(data),),
        output_dir=tmp_path / "tuned",
        settings=(Setting(1e-2, 16),),
        seeds=(0, 1),
        recipe=Recipe(num_train_epochs=2),
        metric=None,
        max_seq_length=None,
    )


def results(config):
    return json.loads((config.output_dir / "results.json").read_text())


def test_it_learns_and_leaves_a_model_that_transformers_opens(config):
    config = replace(config, recipe=Recipe(num_train_epochs=8))
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert finetune(config) == 0
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    found = results(config)
    assert found["best"]["validation"]["accuracy"] > 0.9
    score = f"| accuracy, validation | {found['best']['validation']['accuracy']:.4f} |"
    assert score in (config.output_dir / "README.md").read_text()
    for split in ("test", "validation_mismatched"):
        assert found["best"][split] == pytest.approx(found["best"]["validation"], abs=1e-6)  # the same rows
    assert len(found["settings"][0]["runs"]) == 2
    assert [path.name for path in config.output_dir.parent.iterdir()] == ["tuned"]
    (config.output_dir.parent / "new").touch()
    permissions = (config.output_dir.parent / "new").stat().st_mode
    assert {path.stat().st_mode for path in config.output_dir.iterdir()} == {permissions}
    classify = transformers.pipeline("text-classification", model=str(config.output_dir))
    assert [classify(text)[0]["label"] for text in ("karen vorpali minka", "karen sulto minka")] == ["1", "0"]


class StopAfter:
    """Replaces `StopRequest`: asks to stop after a number of steps."""

    def __init__(self, steps):
        self.steps = steps

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def agreed(self):
        self.steps -= 1
        return self.steps == 0


def test_a_fine_tuning_that_is_stopped_and_killed_ends_as_the_unbroken_one(config, monkeypatch, tmp_path):
    assert finetune(config) == 0
    broken = replace(config, output_dir=tmp_path / "broken")
    module = "ds_roberta.finetuning.finetune"
    for steps in (2, 4, 8):  # within an epoch, within the next one, and in the second seed's run
        monkeypatch.setattr(f"{module}.StopRequest", lambda ranks, steps=steps: StopAfter(steps))
        assert finetune(broken) == STOPPED_EXIT_CODE
        assert not broken.output_dir.exists()
    monkeypatch.setattr(f"{module}.StopRequest", StopRequest)
    with monkeypatch.context() as patched:  # as if killed while a checkpoint was written
        patched.setattr(transformers.TrainerState, "save_to_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finetune(broken)
    assert finetune(broken) == 0
    assert (broken.output_dir / RESULTS).read_text() == (config.output_dir / RESULTS).read_text()
    weights = [(folder / "model.safetensors").read_bytes() for folder in (config.output_dir, broken.output_dir)]
    assert weights[0] == weights[1]


def test_an_epoch_that_was_stopped_at_its_end_and_killed_is_evaluated(config, monkeypatch, tmp_path):
    config = replace(config, seeds=(0,))  # 4 steps an epoch
    assert finetune(config) == 0
    broken = replace(config, output_dir=tmp_path / "broken")
    with monkeypatch.context() as patched:
        patched.setattr("ds_roberta.finetuning.finetune.StopRequest", lambda ranks: StopAfter(4))
        patched.setattr(Classification, "metrics", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finetune(broken)
    assert finetune(broken) == 0
    assert results(broken) == results(config)


def test_stops_within_epochs_after_the_best_one_lose_no_step(config, monkeypatch, caplog):
    """Each call continues where the one before was stopped, although the best epoch was earlier."""
    config = replace(config, seeds=(0,), recipe=Recipe(num_train_epochs=5))  # of 4 steps
    with caplog.at_level("INFO"):
        for _ in range(3):
            monkeypatch.setattr("ds_roberta.finetuning.finetune.StopRequest", lambda ranks: StopAfter(6))
            assert finetune(config) == STOPPED_EXIT_CODE
    assert [f"continues from step {step}" in caplog.text for step in (6, 12)] == [True] * 2


def test_a_part_of_the_runs_whose_weights_were_removed_is_trained_again(config, monkeypatch):
    """The worse of two seeds' runs has no weights left when a third is stopped; then only that run is asked for."""
    config = replace(config, seeds=(0, 1, 2))
    single = {}
    for seed in (0, 1):
        run = replace(config, seeds=(seed,), output_dir=config.output_dir.with_name(f"seed-{seed}"))
        assert finetune(run) == 0
        single[seed] = results(run)["best"]
    monkeypatch.setattr("ds_roberta.finetuning.finetune.StopRequest", lambda ranks: StopAfter(2 * 7 + 3))
    assert finetune(config) == STOPPED_EXIT_CODE
    monkeypatch.undo()
    (plan,) = config.output_dir.with_name(".tuned.runs").iterdir()
    (worse,) = [seed for seed in (0, 1) if not (plan / f"rate-0.01-batch-16-seed-{seed}" / "model").exists()]
    assert finetune(replace(config, seeds=(worse,))) == 0
    assert results(config)["best"] == single[worse]


def test_an_output_within_the_data_does_not_change_the_plan(config, data, monkeypatch, tmp_path, caplog):
    shutil.copytree(data, tmp_path / "r=1")
    config = replace(config, data=(str(tmp_path / "r=1"),), output_dir=tmp_path / "r=1" / "tuned")
    monkeypatch.setattr("ds_roberta.finetuning.finetune.StopRequest", lambda ranks: StopAfter(2))
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert finetune(config) == STOPPED_EXIT_CODE
            (tmp_path / "r=1/notes.md").write_text("Nothing that is read.")
    assert "continues from step 2" in caplog.text
    assert "starting from scratch" not in caplog.text
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(config.model)
    caplog.clear()
    with caplog.at_level("INFO"):
        assert (
            finetune(replace(config, model=Path("model"), data=("r=1/",), output_dir=Path("r=1/tuned")))
            == STOPPED_EXIT_CODE
        )
    assert "continues from step 4" in caplog.text
    train = tmp_path / "r=1/train.jsonl"
    train.write_text(train.read_text().replace("karen", "teppo", 1))
    with caplog.at_level("INFO"):
        assert finetune(config) == STOPPED_EXIT_CODE
    assert "starting from scratch" in caplog.text


def test_a_changed_plan_does_not_continue_the_old_one(config, monkeypatch):
    monkeypatch.setattr("ds_roberta.finetuning.finetune.StopRequest", lambda ranks: StopAfter(2))
    assert finetune(config) == STOPPED_EXIT_CODE
    monkeypatch.undo()
    changed = replace(config, recipe=Recipe(num_train_epochs=1), seeds=(0,))
    assert finetune(changed) == 0
    assert len(results(changed)["settings"][0]["runs"][0]["epochs"]) == 1


WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def losses_of(config, model=None, **recipe):
    run = replace(config, model=model or config.model, settings=(Setting(1e-3, 16),), seeds=(0,))
    run = replace(run, recipe=replace(config.recipe, **recipe))
    assert finetune(run) == 0
    return [epoch["loss"] for epoch in results(run)["settings"][0]["runs"][0]["epochs"]]


def test_accumulation_does_not_change_the_training(config):
    whole, parts = (losses_of(config, **WITHOUT_DROPOUT, gradient_accumulation_steps=parts) for parts in (1, 4))
    assert parts == pytest.approx(whole, rel=1e-5)


def test_dropout_is_the_models_own_unless_it_is_given(config, tmp_path):
    folder = tmp_path / "without dropout"
    shutil.copytree(config.model, folder)
    change_config(folder, **WITHOUT_DROPOUT)
    without, with_it = losses_of(config, folder), losses_of(config)
    assert without == losses_of(config, **WITHOUT_DROPOUT) != with_it
    change_config(folder, classifier_dropout=0.5)  # would take precedence over hidden_dropout_prob
    assert losses_of(config, folder) != without
    assert losses_of(config, folder, **dict.fromkeys(WITHOUT_DROPOUT, 0.1)) == with_it
    with pytest.raises(UserError, match="hidden_dropout_prob must be at least 0 and below 1, got 1"):
        Recipe(hidden_dropout_prob=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "pearson"}, "--metric pearson does not exist for these data"),
        ({"seeds": (1, 1)}, "has a seed twice"),
        ({"settings": (Setting(1e-3, 16), Setting(1e-3, 16))}, "has a value twice"),
        ({"recipe": Recipe(gradient_accumulation_steps=3)}, "batch of 16 cannot be divided.*multiple of 3"),
        ({"max_seq_length": 63}, "--max_seq_length 63 is more than the model's 62 positions"),
        ({"max_seq_length": 7}, "--max_seq_length must be at least 8, got 7"),
        ({"settings": (Setting(1e30, 16),)}, "the loss is nan in training at .* use a lower --learning_rate"),
    ],
)
def test_impossible_settings_are_refused(config, changes, message):
    with pytest.raises(UserError, match=message):
        finetune(replace(config, **changes))
    assert not config.output_dir.exists()
    assert not list(config.output_dir.parent.glob(".*"))


def test_runs_that_finished_before_one_diverged_are_taken_over(config, caplog):
    caplog.set_level("INFO")
    good, bad = Setting(1e-2, 16), Setting(1e30, 16)
    config = replace(config, seeds=(0,), recipe=Recipe(num_train_epochs=1))
    with pytest.raises(UserError, match=r"the loss is nan in training at learning rate 1e\+30, batch 16, seed 0"):
        finetune(replace(config, settings=(good, bad)))
    work = config.output_dir.parent / ".tuned.runs"
    assert f"the other runs stay in {work}" in caplog.text
    assert [path.name for path in work.glob("*/*")] == ["rate-0.01-batch-16-seed-0"]
    caplog.clear()
    assert finetune(replace(config, settings=(good,))) == 0
    assert "epoch 1 of 1" not in caplog.text
    assert not work.exists()


def test_checkpoints_of_one_second_are_no_news(config, monkeypatch):
    said = []
    log = logging.getLogger("transformers.trainer_utils")
    monkeypatch.setattr(log, "handle", lambda record: said.append(record.getMessage()) if log.filter(record) else None)
    assert finetune(replace(config, seeds=(0,), recipe=Recipe(num_train_epochs=1))) == 0
    for step in (1, 2):
        (config.output_dir.parent / f"checkpoint-{step}").mkdir()
    transformers.utils.logging.warning_once.cache_clear()
    transformers.trainer_utils.sort_checkpoints(str(config.output_dir.parent), use_mtime=True)
    assert said == []
    log.warning("other")
    assert said == ["other"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Setting(0.0, 16), "learning_rate must be a number above 0, got 0.0"),
        (lambda: Setting(1e-4, 0), "train_batch_size must be a positive whole number, got 0"),
        (lambda: Recipe(num_train_epochs=0), "num_train_epochs must be"),
        (lambda: Recipe(weight_decay=float("nan")), "weight_decay must be 0 or a number above it, got nan"),
        (lambda: Recipe(warmup_ratio=6), "warmup_ratio must be from 0 to 1, got 6"),
        (lambda: Recipe(bf16=True, fp16=True), "--bf16 and --fp16 are both given"),
        (lambda: SpanOptions(doc_stride=0), "doc_stride must be"),
        (lambda: SpanOptions(no_answer_threshold=2), "no_answer_threshold must be from 0 to 1, got 2"),
        (
            lambda: FinetuneConfig(Path("m"), "regression", ("d",), Path("o"), seeds=(2**32,)),
            "--seeds 4294967296 is not",
        ),
        (lambda: FinetuneConfig(Path("m"), "tagging", ("d",), Path("o")), "--task must be one of .*, got 'tagging'"),
        (lambda: FinetuneConfig(Path("m"), "regression", ("d",), Path("o"), seeds=()), "at least one entry each"),
    ],
)
def test_impossible_values_from_python_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_fp16_without_a_gpu_is_refused(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--fp16 needs a GPU, and none is found here"):
        finetune(replace(config, recipe=Recipe(num_train_epochs=1, fp16=True)))


def test_an_output_with_the_model_in_it_is_refused(config):
    for output in (config.model, config.model.parent):
        with pytest.raises(UserError, match=r"--model .* is in --output_dir .*: choose another folder for the output"):
            finetune(replace(config, output_dir=output))


def test_an_output_that_the_disk_refuses_is_named(config):
    with pytest.raises(UserError, match=r"^cannot write '/proc/tuned' \(No such file or directory.*another output"):
        finetune(replace(config, output_dir=Path("/proc/tuned")))


def change_config(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


def test_a_folder_with_something_else_is_not_replaced(config):
    config.output_dir.mkdir()
    (config.output_dir / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty and not just a model from an earlier fine-tuning"):
        finetune(config)
    for name in ("config.json", "results.json"):
        (config.output_dir / name).write_text("{}")
    with pytest.raises(UserError, match="not empty and not just a model from an earlier fine-tuning"):
        finetune(config)
    assert (config.output_dir / "mine.txt").read_text() == "keep"


def test_a_deepspeed_json_is_read_before_the_work(config, tmp_path):
    (tmp_path / "bad.json").write_text("[]")
    (tmp_path / "zero2.json").write_text((REPOSITORY / "ds_configs/zero2.json").read_text())
    zero3 = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": zero3}))
    for name, message in (
        ("bad.json", "must be a JSON object"),
        ("none.json", "cannot read --deepspeed_config"),
        ("zero2.json", "sets optimizer, train_batch_size"),
        ("zero3.json", "so no model could be written"),
    ):
        with pytest.raises(UserError, match=message):
            finetune(replace(config, deepspeed_config=tmp_path / name))
