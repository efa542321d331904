"""Runs that end before their last epoch, runs on a part of the examples, and what a person sees of a fine-tuning."""

import json
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import transformers

from ds_roberta import progress
from ds_roberta.distributed import StopRequest
from ds_roberta.finetuning import one_run
from ds_roberta.finetuning.finetune import STOPPED_EXIT_CODE, FinetuneConfig, finetune, is_finetuned_folder
from ds_roberta.finetuning.one_run import Recipe, Setting, stops_early
from ds_roberta.report.page import write_report
from ds_roberta.report.runs import read_runs

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Trainer's
EPOCHS, PATIENCE = 12, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts labelled by whether they contain a word, in the order of their labels."""
    rng = random.Random(0)
    rows = []
    for label in (0, 1):
        for _ in range(40):
            words = [rng.choice(["karen", "sulto", "minka", "shendu"]) for _ in range(6)]
            if label:
                words[rng.randrange(6)] = "vorpali"
            rows.append(json.dumps({"text": " ".join(words), "label": label}))
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.jsonl").write_text("\n".join(rows[:32] + rows[40:72]))
    (folder / "dev.jsonl").write_text("\n".join(rows[32:40] + rows[72:]))
    return folder


@pytest.fixture(scope="module")
def config(roberta_folder, data, tmp_path_factory):
    return FinetuneConfig(
        model=roberta_folder,
        task="classification",
        data=(str(data),),
        output_dir=tmp_path_factory.mktemp("outputs") / "tuned",
        settings=(Setting(1e-2, 16),),
        recipe=Recipe(num_train_epochs=EPOCHS, early_stopping=PATIENCE),
    )


@pytest.fixture(scope="module")
def stopped_early(config):
    """The results of a run that ends early."""
    assert finetune(config) == 0
    return results(config)


def results(config):
    return json.loads((config.output_dir / "results.json").read_text())


def weights(config):
    return (config.output_dir / "model.safetensors").read_bytes()


def stop_after(steps):
    """Replaces `StopRequest`: asks to stop after a number of steps."""
    left = iter([False] * (steps - 1) + [True])

    class Stop:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def agreed(self):
            return next(left)

    return lambda ranks: Stop()


def test_a_run_ends_some_epochs_after_its_best_and_follows_the_schedule_of_all(config, stopped_early, tmp_path):
    (run,) = stopped_early["settings"][0]["runs"]
    assert run["stopped_after_epoch"] == len(run["epochs"]) == run["epoch"] + PATIENCE < EPOCHS
    assert stopped_early["best"]["stopped_after_epoch"] == run["stopped_after_epoch"]
    assert stopped_early["recipe"]["early_stopping"] == PATIENCE
    whole = replace(config, output_dir=tmp_path / "whole", recipe=Recipe(num_train_epochs=EPOCHS))
    assert finetune(whole) == 0
    (all_epochs,) = results(whole)["settings"][0]["runs"]
    assert all_epochs["epochs"][: len(run["epochs"])] == run["epochs"]
    assert (len(all_epochs["epochs"]), all_epochs["stopped_after_epoch"]) == (EPOCHS, None)


def test_a_run_stopped_before_and_killed_after_its_early_end_ends_as_the_unbroken_one(
    config, stopped_early, monkeypatch, tmp_path
):
    broken = replace(config, output_dir=tmp_path / "broken")
    best, last = (4 * stopped_early["settings"][0]["runs"][0][name] for name in ("epoch", "stopped_after_epoch"))
    module = "ds_roberta.finetuning.finetune.StopRequest"
    for steps in (best + 1, 4):  # within the first epoch that does not improve, and at the end of the same epoch
        monkeypatch.setattr(module, stop_after(steps))
        assert finetune(broken) == STOPPED_EXIT_CODE
    monkeypatch.setattr(module, StopRequest)
    with monkeypatch.context() as patched:
        patched.setattr(one_run, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finetune(broken)
    assert list(tmp_path.glob(f".broken.runs/*/*/trainer/checkpoint-{last}"))
    assert finetune(broken) == 0
    assert results(broken) == stopped_early
    assert weights(broken) == weights(config)


def test_epochs_are_counted_as_transformers_counts_them():
    rng = random.Random(0)
    for patience in (1, 2, 3):
        for _ in range(30):
            epochs = [{"f1": rng.choice([0.1, 0.2, 0.3])} for _ in range(8)]
            theirs = transformers.EarlyStoppingCallback(early_stopping_patience=patience)
            arguments = SimpleNamespace(greater_is_better=True, metric_for_best_model="f1")
            best, control = None, transformers.TrainerControl()
            for number, epoch in enumerate(epochs, 1):
                state = transformers.TrainerState(best_metric=best)
                theirs.on_evaluate(arguments, state, control, {"eval_f1": epoch["f1"]})
                assert stops_early(epochs[:number], "f1", patience) == control.should_training_stop
                if control.should_training_stop:
                    break
                best = epoch["f1"] if best is None else max(best, epoch["f1"])


def test_processes_that_round_differently_end_together(on_ranks):
    problem = SimpleNamespace(metric="pearson", recipe=Recipe(early_stopping=1))

    def ends(ranks):
        bar = progress.StepBar(9, "run", visible=False)
        watch = one_run._Watch("run", problem, one_run._BatchLoss(None), bar, None, ranks)
        improved = 0.5 + 1e-12 * ranks.rank
        log = [{"eval_loss": 1.0, "eval_pearson": 0.5}, {"eval_loss": 1.0, "eval_pearson": improved}]
        state = transformers.TrainerState(log_history=log, epoch=2.0, global_step=2, max_steps=9)
        control = transformers.TrainerControl()
        watch.on_evaluate(SimpleNamespace(num_train_epochs=9), state, control, metrics=log[-1])
        return control.should_training_stop

    assert on_ranks(2, ends) == [True, True]


def test_a_part_of_the_training_examples_is_a_fixed_random_sample(config, monkeypatch, tmp_path, caplog):
    trained, train = [], one_run.train

    def note(problem, *others):
        texts = problem.encoded["train"].inputs
        assert len({text.label for text in texts}) == 2  # the file has one label after the other
        trained.append([text.place for text in texts])
        return train(problem, *others)

    monkeypatch.setattr("ds_roberta.finetuning.finetune.train", note)
    part = replace(config, output_dir=tmp_path / "part", recipe=Recipe(num_train_epochs=1))
    with caplog.at_level("INFO"):
        for at_most, seeds in ((16, (0, 1)), (32, (0,)), (64, (0,))):
            assert finetune(replace(part, max_train_samples=at_most, seeds=seeds)) == 0
            found = results(part)
            assert (found["max_train_samples"], found["examples"]["train"]) == (at_most, at_most)
    assert "16 of 64 training examples are used" in caplog.text
    assert "64 of 64" not in caplog.text
    sixteen, of_another_seed, thirty_two, everything = trained
    assert sixteen == of_another_seed == [place for place in thirty_two if place in sixteen]
    assert thirty_two == [place for place in everything if place in thirty_two]


def test_another_part_is_another_plan(config, monkeypatch, tmp_path, caplog):
    part = replace(config, output_dir=tmp_path / "part", recipe=Recipe(num_train_epochs=1), max_train_samples=32)
    monkeypatch.setattr("ds_roberta.finetuning.finetune.StopRequest", stop_after(1))
    with caplog.at_level("INFO"):
        assert finetune(part) == STOPPED_EXIT_CODE
        monkeypatch.undo()
        assert finetune(replace(part, max_train_samples=48)) == 0
    assert "belongs to another fine-tuning" in caplog.text


def test_the_bar_shows_the_loss_of_whole_steps(config, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0.0)
    recipe = Recipe(num_train_epochs=2, gradient_accumulation_steps=4)
    assert finetune(replace(config, output_dir=tmp_path / "shown", settings=(Setting(1e-30, 16),), recipe=recipe)) == 0
    shown = capsys.readouterr().err
    losses = [float(part.split()[0]) for part in shown.split("step 8/8, loss ")[1:]]
    assert losses[-1] == pytest.approx(0.693, abs=0.1)  # ln 2: nothing is learned at this rate


def test_the_report_shows_what_the_chosen_model_confuses(config, stopped_early, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text('{"global_step": 1, "loss": 2.0}\n')
    (tmp_path / "config.json").write_text("{}")
    shutil.copytree(config.output_dir, tmp_path / "tuned")
    assert is_finetuned_folder(tmp_path / "tuned")
    (run,) = read_runs([tmp_path])
    analysis = run.error_analyses["tuned/results.json"]
    validation = stopped_early["best"]["validation"]
    right = sum(analysis.confusion[label].get(label, 0) for label in ("0", "1"))
    assert right / 16 == validation["accuracy"]
    losses = [each["loss"] for each in analysis.worst]
    assert len(losses) == 16  # all there are
    assert sum(losses) / 16 == pytest.approx(validation["loss"], rel=1e-5)
    write_report([tmp_path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "errors on the validation examples" in page
    assert page.index("Confusion of examples") < page.index(analysis.worst[0]["text"])


def test_the_recipe_is_what_trains(config, monkeypatch, tmp_path):
    trainers, train = [], transformers.Trainer.train
    monkeypatch.setattr(
        transformers.Trainer, "train", lambda self, **given: trainers.append(self) or train(self, **given)
    )
    recipe = Recipe(num_train_epochs=2, warmup_ratio=0.25, weight_decay=0.05, gradient_accumulation_steps=2, bf16=True)
    assert finetune(replace(config, output_dir=tmp_path / "tuned", seeds=(3,), recipe=recipe)) == 0
    (trainer,) = trainers
    arguments = trainer.args
    assert (arguments.seed, arguments.bf16, arguments.max_grad_norm) == (3, True, 0.0)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (8, 2)
    decays = {group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert 0.05 in decays <= {0.0, 0.05}
    assert all((group["betas"], group["eps"]) == ((0.9, 0.98), 1e-6) for group in trainer.optimizer.param_groups)
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    assert rates == pytest.approx([1e-2 * 5 / 6, 1e-2 * 1 / 6])  # of 8 steps, after 2 that rise: those of steps 4 and 8
