"""Comparisons of pretraining runs: what their files say is what the command takes; their tables."""

import argparse
import json
import runpy

import pytest

from benchmarks.compare import (
    Comparison,
    Result,
    Run,
    arguments,
    compare,
    loss_table,
    measure,
    metrics_table,
    report,
    result_path,
)
from benchmarks.environment import REPOSITORY
from benchmarks.studies import only_here
from ds_roberta.errors import UserError
from ds_roberta.training.recipes import RECIPES, Recipe

FILES = sorted((REPOSITORY / "examples/recipes").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_command_takes_every_run_of_a_file(path, corpus, tmp_path):
    pytest.importorskip("deepspeed")
    from ds_roberta.training.run import _read_inputs

    parse = runpy.run_path(str(REPOSITORY / "launch/pretrain.py"))["parse_arguments"]
    options = argparse.Namespace(
        data_dir=corpus.folder, model="nano", max_seq_length=128, eval_sequences=4, max_tokens=1000, max_minutes=None,
        results=tmp_path,
    )  # fmt: skip
    comparison = Comparison.read(path)
    seen = set()
    for name in comparison.runs:
        given = {**arguments(options, comparison, name), "output_dir": tmp_path / "run"}
        given.pop("source_weights", None)  # of sources that this corpus lacks
        words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        deepspeed, _, config, *_ = _read_inputs(parse(words))
        seen.add(json.dumps([deepspeed.content, config.as_json(), comparison.runs[name].budget], default=str))
    assert len(seen) == len(comparison.runs) or path.stem == "more_data"  # which differs in its sources alone


def test_factors_multiply_the_recipes_values_for_the_width(tmp_path):
    options = argparse.Namespace(
        data_dir="data", model="small", max_seq_length=128, eval_sequences=4, max_tokens=1000, max_minutes=None,
        results=tmp_path,
    )  # fmt: skip
    run = Run(deepspeed={"gradient_clipping": 0.5}, factors={"adam_lr": 2}, budget=3)
    given = arguments(options, Comparison("?", "", {"doubled": run}), "doubled")
    written = json.loads(given["deepspeed_config"].read_text())
    assert (given["max_tokens"], written["gradient_clipping"]) == (3000, 0.5)
    assert (written["optimizer"]["params"]["adam_lr"], written["optimizer"]["params"]["muon_lr"]) == (2e-3, 0.01)


def test_what_is_no_comparison_is_refused(tmp_path):
    path = tmp_path / "mine.json"
    for content in ({"question": "?"}, {"question": "?", "source": "", "runs": {"a": {"option": {}}}}, []):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match="is no comparison"):
            Comparison.read(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_runs_of_other_masks_or_sequences_are_evaluated_alike(path):
    comparison, fast = Comparison.read(path), RECIPES["fast"].options
    decisive = ("eval_mlm_probability", "mask_replace_prob", "random_replace_prob", "masking", "packing")
    usual = {name: fast.get(name) for name in decisive}
    held_out = [
        {**usual, **comparison.options, **run.options}
        for run in comparison.runs.values()
        if run.options.get("objective") != "rts"
    ]  # which has no masked-LM loss
    kinds = {tuple(options[name] for name in decisive) for options in held_out}
    assert len(kinds) == 1 or comparison.evaluation


def test_calls_at_the_same_time_share_the_runs(corpus, tmp_path, capsys):
    comparison, results = tmp_path / "mine.json", tmp_path / "results"
    comparison.write_text(json.dumps({"question": "?", "source": "", "runs": {"elsewhere": {}, "finished": {}}}))
    options = argparse.Namespace(
        comparison=comparison, data_dir=corpus.folder, model="nano", max_seq_length=128, max_tokens=1000,
        max_minutes=None, seeds=(0,), runs=None, finetune_data=None, pairs=None, eval_sequences=4,
        results=results,
    )  # fmt: skip
    results.mkdir()
    result_path(options, "finished", 0).write_text(json.dumps({"commit": "c", "cpu": "C", "eval_loss": 2.0}))
    with only_here(results, result_path(options, "elsewhere", 0).stem):
        compare(options)
    assert "elsewhere, seed 0: another call measures it" in capsys.readouterr().out
    assert "| finished |  |  | 2.000 | 2.000 |" in results.with_suffix(".md").read_text()


def test_a_result_of_other_settings_is_not_taken_for_this_runs(corpus, tmp_path, monkeypatch):
    options = argparse.Namespace(
        data_dir=corpus.folder, model="nano", max_seq_length=128, max_tokens=1000, max_minutes=None,
        finetune_data=tmp_path / "sst2", num_train_epochs=3, finetune_learning_rates=(1e-3,), max_train_samples=9,
        pairs=tmp_path / "blimp", eval_sequences=4, results=tmp_path, seeds=(0,), finetune_dropout=None,
    )  # fmt: skip
    monkeypatch.setattr("benchmarks.compare.execute", lambda *_: None)
    monkeypatch.setattr("benchmarks.compare.held_out_loss", lambda *_: 2.0)
    monkeypatch.setattr("benchmarks.compare.trained", lambda _: {"tokens": 1e6, "step_seconds": 60.0})
    monkeypatch.setattr("benchmarks.compare.finetuned", lambda *_: {"0.001": 0.5})
    monkeypatch.setattr("benchmarks.compare.minimal_pairs", lambda *_: 0.5)
    usual = Comparison("?", "", {"run": Run()})
    measure(options, usual, "run", 0, 0)
    measure(options, usual, "run", 0, 0)
    for other in (
        Comparison("?", "", {"run": Run({"mlm_probability": 0.2})}),
        Comparison("?", "", {"run": Run()}, evaluation={"packing": "contiguous"}),
        Comparison("?", "", {"run": Run(factors={"muon_lr": 2})}),
    ):
        with pytest.raises(UserError, match="is of other data, options or values of the recipe"):
            measure(options, other, "run", 0, 0)
        with pytest.raises(UserError, match="is of other data, options or values of the recipe"):
            report(options, other)
    for changed, message in (
        ({"finetune_data": tmp_path / "cola"}, "is of another task or fine-tuning"),
        ({"finetune_learning_rates": (1e-3, 1e-4)}, "is of another task or fine-tuning"),
        ({"finetune_dropout": 0.0}, "is of another task or fine-tuning"),
        ({"pairs": tmp_path / "zorro"}, "is of other minimal pairs"),
    ):
        with pytest.raises(UserError, match=message):
            measure(argparse.Namespace(**{**vars(options), **changed}), usual, "run", 0, 0)
    fast = RECIPES["fast"]
    monkeypatch.setitem(RECIPES, "fast", Recipe(fast.deepspeed_config, {"mlm_probability": 0.3}, fast.optimizer_params))
    with pytest.raises(UserError, match="values of the recipe"):
        measure(options, usual, "run", 0, 0)


def test_losses_are_held_against_the_first_run_and_its_spread():
    found = {
        "first": {0: Result("c", "C", 2.0, 1e6, 60.0), 1: Result("c", "C", 2.2, 1e6, 80.0)},
        "near": {0: Result("c", "C", 2.1), 1: Result("c", "C", 2.5)},
        "far": {0: Result("c", "C", 1.5), 1: Result("c", "C", 1.9)},
        "one": {1: Result("c", "C", 2.3)},
        "other objective": {0: Result("c", "C", None, 2e6, 70.0)},
        "missing": {},
    }
    first, near, far, one, other = loss_table(found)[2:]
    assert first == "| first | 1.00 | 70 | 2.000, 2.200 | 2.100 |  |"
    assert near == "| near |  |  | 2.100, 2.500 | 2.300 | +0.200, inside the spread |"
    assert far.endswith("| 1.700 | -0.400 |")
    assert one.endswith("| 2.300 | +0.100, one seed |")
    assert other == "| other objective | 2.00 | 70 |  |  |  |"


def test_accuracies_are_those_of_the_rate_with_the_best_median(tmp_path):
    options = argparse.Namespace(finetune_data=tmp_path / "sst2", num_train_epochs=3, max_train_samples=9)

    def tuned(*pairs):
        return {
            seed: Result("c", "C", metrics={"0.0001": low, "0.0003": high}) for seed, (low, high) in enumerate(pairs)
        }

    found = {"a": tuned((0.7, 0.9), (0.7, 0.6), (0.7, 0.6)), "b": tuned((0.5, 0.8), (0.5, 0.8), (0.5, 0.8))}
    a, b = metrics_table(options, found)[-2:]
    assert a == "| a, at 0.0001 | 0.700, 0.700, 0.700 | 0.700 |  |"
    assert b == "| b, at 0.0003 | 0.800, 0.800, 0.800 | 0.800 | +0.100 |"
