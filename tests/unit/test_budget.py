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


def scheduled(max_seq_length_schedule, train_batch_size_schedule=None):
    """Stands in for `with_max_steps` of a run with these schedules."""

    def with_max_steps(run, max_steps):
        stages = make_stages(128, 2, max_seq_length_schedule, train_batch_size_schedule, max_steps)
        intervals, schedule = Namespace(eval_interval=100), Namespace(max_steps=max_steps)
        config = Namespace(stages=stages, intervals=intervals, schedule=schedule)
        return Namespace(**{**vars(run), "config": config})

    return with_max_steps


@pytest.mark.parametrize("tokens", [900, 5_000])
def test_schedules_may_change_at_percents_and_at_steps(monkeypatch, tokens):
    def cost(max_steps):
        half = max_steps // 2
        return sum((1 if step < half else 2) * (1 if step < 500 else 2) for step in range(max_steps))

    with_max_steps = scheduled("0:64,50%:128", "0:1,500:2")
    monkeypatch.setattr(budget, "with_max_steps", with_max_steps)
    per_step = {(64, 1): 1.0, (64, 2): 2.0, (128, 2): 4.0}  # as at very many steps: 128 tokens come after 500 steps
    steps = budget._fitting_steps(with_max_steps(Namespace(), budget.UNPLANNED_STEPS), tokens, per_step)
    assert tokens - 8 < cost(steps) <= tokens


def test_a_budget_for_too_few_steps_says_how_many(monkeypatch):
    monkeypatch.setattr(budget, "with_max_steps", scheduled("0:64,50%:128"))
    run = Namespace(budget={"max_tokens": 300}, config=Namespace(intervals=Namespace(eval_interval=100)))
    with pytest.raises(UserError, match="--max_tokens 300 allows at most 1 steps: the steps of --max_seq_length_sched"):
        budget._fitting_steps(run, 300.0, {(64, 2): 120.0, (128, 2): 250.0})


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


@pytest.fixture
def spend(monkeypatch):
    """A function that lets time pass, which else stands still; `spend.spent` is the time so far."""

    def pass_by(seconds):
        pass_by.spent += seconds

    pass_by.spent = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: pass_by.spent)
    return pass_by


RANKS = Namespace(world_size=1, broadcast=lambda value: value, any=bool)


@pytest.mark.parametrize("micro_steps", [1, 3, 1_000])
def test_a_step_is_timed_by_some_of_its_micro_steps(spend, micro_steps):
    engine = Namespace(rehearse=lambda *micro_batches: spend(0.2 + 0.5 * len(micro_batches)), ranks=RANKS)
    assert _seconds_per_step(engine, [None] * micro_steps, 4.0) == pytest.approx(0.2 + 0.5 * micro_steps)
    assert spend.spent < 20


class HeldOut:
    """A held-out sample of which a micro-batch takes half a second, and more as long as the engine compiles."""

    def __init__(self, micro_batches, spend, compiled=0):
        self.micro_batches, self.graphs = micro_batches, 0
        self._spend, self._left = spend, compiled

    def evaluate(self, model, stop):
        assert model == "model"
        for number in range(self.micro_batches):
            if stop():
                return
            self._spend(0.5)
            if number == self.micro_batches - 1 and self.graphs < self._left:  # it has empty places
                self.graphs += 1
                self._spend(100.0)


@pytest.mark.parametrize("micro_batches", [1, 3, 1_000])
@pytest.mark.parametrize("compiled", [0, 1])
def test_an_evaluation_is_timed_by_some_of_its_micro_batches(monkeypatch, spend, micro_batches, compiled):
    held_out = HeldOut(micro_batches, spend, compiled)
    monkeypatch.setattr(budget, "compiled_graphs", lambda: held_out.graphs)
    seconds = budget._seconds_per_evaluation(Namespace(evaluate="model", ranks=RANKS), held_out, 4.0)
    assert seconds == 0.5 * micro_batches
    assert spend.spent < (120 if held_out.graphs else 10)


@pytest.fixture
def within_minutes(monkeypatch, spend):
    """A function that plans a run of so many minutes, half of its steps at 64 tokens and half at 128, whose process
    began 20 seconds ago."""

    def micro_batches(step):
        """How long each takes, in the middle of either half of the unplanned steps."""
        return {1 << 28: [0.25, 0.25], 3 << 28: [1.0, 1.0]}[step]

    def plan(minutes, held_out):
        loader = Namespace(micro_batches=micro_batches, level=lambda step, micro_batches, ranks: micro_batches)
        monkeypatch.setattr(budget, "make_loaders", lambda *_: (loader, held_out))
        monkeypatch.setattr(budget, "with_max_steps", scheduled("0:64,50%:128"))
        module = Namespace(masker=None, parameters=lambda: [Namespace(numel=lambda: 10_000_000)] * 2)
        engine = Namespace(
            module=module,
            device=Namespace(type="cpu"),
            ranks=RANKS,
            rehearse=lambda *micro_batches: spend(sum(micro_batches)),
            evaluate="model",
        )
        run = Namespace(ranks=RANKS, began=-20.0, budget={"max_minutes": minutes})
        run = budget.with_max_steps(run, budget.UNPLANNED_STEPS)
        return budget._steps_within_minutes(run, None, engine, {64: 2, 128: 2})

    return plan


MEASURED = "0.5 s a step at 64 tokens, 2 s a step at 128 tokens"


@pytest.mark.parametrize("micro_batches", [0, 8])
def test_the_minutes_pay_for_start_steps_evaluations_and_end(within_minutes, spend, micro_batches):
    held_out = HeldOut(micro_batches, spend) if micro_batches else None
    steps, measured = within_minutes(30.0, held_out)
    assert measured == MEASURED + (", 4 s an evaluation" if held_out else "")
    left = 30 * 60 - 20 - spend.spent - (10 + 2)  # a tenth of a microsecond for each parameter

    def cost(steps):
        return steps // 2 * 0.5 + (steps - steps // 2) * 2.0 + micro_batches * 0.5 * evaluations(steps, 100)

    assert cost(steps) <= left < cost(steps + 1)
    assert spend.spent < 100


def test_too_few_minutes_say_what_they_are_needed_for(within_minutes, spend):
    with pytest.raises(UserError) as refusal:
        within_minutes(0.9, HeldOut(8, spend))
    taken = f"{20 + spend.spent + 12:.0f} s, beside {MEASURED}, 4 s an evaluation"
    assert str(refusal.value) == (
        f"--max_minutes 0.9 is too short: the start and the end take {taken}: give more minutes, "
        "a smaller --model or batch, or fewer --eval_sequences"
    )
