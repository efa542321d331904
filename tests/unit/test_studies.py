"""Studies: what one call measures, what it waits for, and what it says of its settings."""

import argparse
import json
import threading
from pathlib import Path

import pytest

from benchmarks import studies
from benchmarks.studies import Item, beside, command_of, difference, finish_all, only_here, recipe_name
from ds_roberta.errors import UserError
from ds_roberta.training.recipes import RECIPES, Recipe


def item(name, needs=(), measure=lambda _: {}):
    return Item("part", name, needs, measure)


def test_a_call_waits_for_what_another_measures_and_then_goes_on_with_what_needs_it(tmp_path, monkeypatch, capsys):
    held, waits, measured, found = threading.Event(), threading.Event(), [], {}
    monkeypatch.setattr(studies.time, "sleep", lambda _: waits.set())

    def elsewhere():
        with only_here(tmp_path, "texts"):
            held.set()
            waits.wait()
            (tmp_path / "texts.json").write_text('{"from": "elsewhere"}')

    other = threading.Thread(target=elsewhere, daemon=True)
    other.start()
    held.wait()
    items = [item("texts", measure=pytest.fail), item("run", ("texts",), lambda _: measured.append("run") or {"a": 1})]
    finish_all(tmp_path, items, ["part"], found.update)
    other.join()
    assert capsys.readouterr().out.count("texts: another call measures it") == 1
    assert measured == ["run"]
    assert found["texts"] == {"from": "elsewhere"}
    assert found["run"]["a"] == 1


def test_an_item_that_fails_keeps_only_those_from_being_measured_that_need_it(tmp_path, capsys):
    def fails(_):
        raise UserError("no memory")

    found = {}
    items = [item("first", measure=fails), item("second", ("first",), pytest.fail), item("third")]
    with pytest.raises(UserError, match="not measured: first; first: no memory"):
        finish_all(tmp_path, items, ["part"], found.update)
    assert found.keys() == {"third"}
    assert "second: needs first first" in capsys.readouterr().out


def test_an_item_names_the_commit_at_which_it_began(tmp_path, monkeypatch):
    commits = iter(["before", "after"])
    monkeypatch.setattr(studies, "commit", lambda: next(commits))
    finish_all(tmp_path, [item("first", measure=lambda _: {})], ["part"], lambda _: None)
    assert json.loads((tmp_path / "first.json").read_text())["commit"] == "before"


def test_a_command_is_written_as_a_shell_takes_it():
    options = argparse.Namespace(
        data_dir=Path("/home/me/data/wiki"), seeds=(0, 1), minutes=7.5, pretrain_options="--decay_steps 94%", more="",
        nothing=None, parts="a", results=Path("r"),
    )  # fmt: skip
    expected = "python -m study --data_dir wiki --seeds 0,1 --minutes 7.5 --pretrain_options '--decay_steps 94%'"
    assert command_of("study", options) == expected


def test_results_of_another_recipe_have_another_name(monkeypatch):
    before, fast = recipe_name(), RECIPES["fast"]
    assert recipe_name() == before
    changed = Recipe(fast.deepspeed_config, {**fast.options, "mlm_probability": 0.3}, fast.optimizer_params)
    monkeypatch.setitem(RECIPES, "fast", changed)
    assert recipe_name() != before
    rates = {128: {"muon_lr": 0.02}}
    monkeypatch.setitem(RECIPES, "fast", Recipe(fast.deepspeed_config, fast.options, rates))
    assert recipe_name() != before


def test_reports_of_folders_with_dots_are_different_files():
    assert beside(Path("a/domain-0.3"), ".md") == Path("a/domain-0.3.md")


def test_a_difference_is_of_the_seeds_that_both_have_and_says_when_that_is_one():
    assert difference({0: 2.0}, {0: 2.5}) == "-0.500, one seed"
    assert difference({0: 2.0, 1: 2.6}, {1: 2.5}) == "+0.100, one seed, inside the spread"
    assert difference({0: 2.0, 1: 2.2}, {0: 2.5, 1: 2.4, 2: 9.0}) == "-0.350"
    assert difference({0: 2.0, 1: 2.6}, {0: 2.5, 1: 2.4}) == "-0.150, inside the spread"
    assert difference({0: 2.0}, {1: 2.5}) == ""
