"""A budget becomes a number of steps, which a run keeps."""

import json
from argparse import Namespace

import pytest

from ds_roberta.data.stages import make_stages
from ds_roberta.errors import UserError
from ds_roberta.training import budget
from ds_roberta.training.budget import _kept_steps, _seconds_per_step, budget_of, evaluations, steps_within
from ds_roberta.training.settings import pretrain_options

MINUTES = {"max_minutes": 4.0}


def write_plan(folder, **changes):
    plan = {"budget": MINUTES, "max_steps": 1_234, "run": "settings", **changes}
    (folder / "plan.json").write_text(json.dumps(plan))


def test_only_one_option_says_where_a_run_ends():
    assert budget_of(pretrain_options(max_steps=5)) == budget_of(pretrain_options()) == {}
    assert budget_of(pretrain_options(max_tokens=5)) == {"max_tokens": 5}
    with pytest.raises(UserError, match="--max_steps and --max_minutes each say where the run ends: give one of them"):
        budget_of(pretrain_options(max_steps=5, max_minutes=1.5))
    for wrong in ({"max_tokens": 0}, {"max_minutes": -1.0}, {"max_minutes": float("nan")}):
        (name,) = wrong
        with pytest.raises(UserError, match=f"--{name} must be a positive"):
            budget_of(pretrain_options(**wrong))


@pytest.mark.parametrize("budget", [1.0, 999.0, 12_345.6])
def test_the_steps_are_the_most_that_a_budget_pays_for(budget):
    def cost(steps):  # the first 60% at half the price, and an evaluation at each 100th step
        return (steps * 60 // 100) * 0.5 + (steps - steps * 60 // 100) * 1.0 + 3 * evaluations(steps, 100)

    steps = steps_within(budget, cost)
    assert steps == 1 or budget - 5 < cost(steps) <= budget + 1


@pytest.mark.parametrize(("budget", "expected"), [(5_000, 1_500), (400, 400), (1_000.5, 1_000)])
def test_a_step_may_cost_more_from_some_step_on(budget, expected):
    steps = steps_within(budget, lambda steps: steps if steps <= 1_000 else 1_000 + 8 * (steps - 1_000))
    assert steps == expected


@pytest.mark.parametrize("tokens", [900, 5_000])
def test_schedules_may_change_at_percents_and_at_steps(monkeypatch, tokens):
    def cost(max_steps):
        half = max_steps // 2
        return sum((1 if step < half else 2) * (1 if step < 500 else 2) for step in range(max_steps))

    def planned(run, max_steps):
        stages = make_stages(128, 2, "0:64,50%:128", "0:1,500:2", max_steps)
        return Namespace(config=Namespace(stages=stages, intervals=Namespace(eval_interval=10)))

    monkeypatch.setattr(budget, "with_max_steps", planned)
    per_step = {(64, 1): 1.0, (64, 2): 2.0, (128, 2): 4.0}  # as at very many steps: 128 tokens come after 500 steps
    steps = budget._fitting_steps(planned(None, budget.UNPLANNED_STEPS), tokens, per_step)
    assert tokens - 8 < cost(steps) <= tokens


def test_evaluations_are_those_of_the_loop():
    for max_steps, interval in ((1, 10), (10, 10), (11, 10), (30, 10), (7, 1)):
        due = [step for step in range(max_steps + 1) if step % interval == 0 or step == max_steps]
        assert evaluations(max_steps, interval) == len(due)


def test_a_run_keeps_its_plan(tmp_path):
    assert _kept_steps(tmp_path, MINUTES, "settings") is None
    write_plan(tmp_path)
    assert _kept_steps(tmp_path, MINUTES, "settings") == 1_234
    assert _kept_steps(tmp_path, MINUTES, "others") is None  # nothing was trained by it
    assert _kept_steps(tmp_path, {"max_minutes": 5.0}, "settings") is None
    (tmp_path / "checkpoints/global_step2").mkdir(parents=True)
    assert _kept_steps(tmp_path, MINUTES, "others") == 1_234  # so that the checkpoint says what differs
    with pytest.raises(UserError, match=r"planned by --max_minutes 4 \(1234 steps\), not by --max_tokens 5000000:"):
        _kept_steps(tmp_path, {"max_tokens": 5_000_000}, "settings")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"budget": {}, "max_steps": "many", "run": ""}'])
def test_a_damaged_plan_is_a_user_error(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UserError, match=r"plan\.json' is damaged .* give the run's steps by --max_steps"):
        _kept_steps(tmp_path, MINUTES, "settings")


@pytest.mark.parametrize("micro_steps", [1, 3, 1_000])
def test_a_step_is_timed_by_some_of_its_micro_steps(monkeypatch, micro_steps):
    now = [0.0]

    def rehearse(*micro_batches):
        now[0] += 0.2 + 0.5 * len(micro_batches)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    engine = Namespace(rehearse=rehearse, ranks=Namespace(broadcast=lambda value: value))
    assert _seconds_per_step(engine, [None] * micro_steps, 4.0) == pytest.approx(0.2 + 0.5 * micro_steps)
    assert now[0] < 20
