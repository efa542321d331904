import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ds_roberta.config import MaskingConfig, model_config
from ds_roberta.errors import UserError
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.training import micro_batch
from ds_roberta.training.micro_batch import (
    FINDINGS_NAME,
    Trial,
    fastest_size,
    find_micro_batch_size,
    finding_conditions,
    full_micro_batch,
    is_out_of_memory,
    largest_fitting,
    largest_size,
    seconds_per_sequence,
)

CPU = torch.device("cpu")
LENGTH = 16
MODEL = model_config("tiny", 100, LENGTH)


class Limited(MaskedLM):
    """Runs out of memory above a number of sequences, as a GPU does."""

    def __init__(self, limit, error):
        super().__init__(MODEL)
        self.limit, self.error, self.sizes = limit, error, []

    def forward(self, batch):
        self.sizes.append(batch.sequences)
        if batch.sequences > self.limit:
            raise self.error
        return super().forward(batch)


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def limited_trial(ranks, limit, error=OUT_OF_MEMORY):
    """An engine's double and trials on it of a real model with a memory limit."""
    model = Limited(limit, error)
    engine = SimpleNamespace(device=CPU, ranks=ranks, twin=lambda make: make())
    return engine, Trial(engine, lambda: model, LENGTH, MaskingConfig()), model


@pytest.mark.parametrize("limit", [1, 2, 3, 64, 100])
def test_the_largest_that_fits_is_found_in_few_trials(limit):
    for capacity in range(limit + 3):
        tried = []

        def fits(size, capacity=capacity, tried=tried):
            tried.append(size)
            return size <= capacity

        assert largest_fitting(fits, limit) == min(capacity, limit)
        assert all(1 <= size <= limit for size in tried)
        assert len(tried) == len(set(tried)) <= 2 * math.ceil(math.log2(limit + 1)) + 1
        assert sum(size > capacity for size in tried) <= math.ceil(math.log2(limit + 1)) + 1


@pytest.mark.parametrize(
    "error",
    [
        OUT_OF_MEMORY,
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
    ],
)
def test_running_out_of_memory_is_an_answer_in_all_its_words(solo_ranks, error):
    assert is_out_of_memory(error)
    engine, trial, model = limited_trial(solo_ranks, 5, error)
    assert largest_size(engine, trial, limit=32) == 5
    assert max(model.sizes) == 8


def test_no_twin_is_made_where_nothing_is_tried(find, solo_ranks):
    def twin(make):
        raise AssertionError("a size is known")

    find.measured.append(7)
    trial = Trial(SimpleNamespace(device=CPU, ranks=solo_ranks, twin=twin), lambda: None, LENGTH, MaskingConfig())
    assert [find(solo_ranks, folder, trial=trial) for folder in "ab"] == [7, 7]


def test_another_error_is_none(solo_ranks):
    engine, trial, _ = limited_trial(solo_ranks, 5, RuntimeError("CUDA error: device-side assert triggered"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        largest_size(engine, trial, limit=32)


def test_a_trial_is_a_whole_backward_pass(solo_ranks):
    _, trial, model = limited_trial(solo_ranks, 5)
    assert trial.fits(2)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_all_ranks_take_the_smallest(on_ranks):
    def find(ranks):
        engine, trial, _ = limited_trial(ranks, (9, 4, 6)[ranks.rank])
        return largest_size(engine, trial, limit=32)

    assert on_ranks(3, find) == [4, 4, 4]


def test_a_sequence_too_long_for_one_rank_ends_all(on_ranks):
    def find(ranks):
        engine, trial, _ = limited_trial(ranks, (9, 0)[ranks.rank])
        return largest_size(engine, trial, limit=32)

    for error in on_ranks(2, find):
        assert isinstance(error, UserError)
        assert "16 tokens" in str(error)


@pytest.mark.parametrize("larger", ["mlm_probability", "mlm_probability_end", "eval_mlm_probability"])
def test_full_sequences_hold_the_most_masked_tokens_of_the_run(larger):
    shares = {"mlm_probability": 0.1, "mlm_probability_end": 0.1, "eval_mlm_probability": 0.1, larger: 0.32}
    batch = full_micro_batch(3, 20, MaskingConfig(**shares))
    assert batch.input_ids.shape == batch.attention_mask.shape == (3, 20)
    assert len(batch.labels) == len(set(batch.masked_positions.tolist())) == 21
    assert batch.masked_positions.max() < 60


class Clock:
    """A clock that computing moves: `cost[size]` seconds for one micro-batch."""

    def __init__(self, cost):
        self.now, self.cost, self.runs = 0.0, cost, []

    def __call__(self):
        return self.now

    def run(self, size):
        self.runs.append(size)
        self.now += self.cost(size)


def test_times_are_taken_while_there_are_seconds():
    clock = Clock(lambda size: 0.01 * size + 0.1)
    seconds = seconds_per_sequence(clock.run, [2, 4, 8], clock)
    assert seconds == pytest.approx([0.06, 0.035, 0.0225])
    slow = Clock(lambda size: 1.1 * size)
    assert seconds_per_sequence(slow.run, [1, 2, 4], slow)[1:] == [math.inf, math.inf]
    assert slow.now <= 3.3


def speed_engine(ranks):
    return SimpleNamespace(device=CPU, ranks=ranks)


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ({}, 32),
        ({16: 0.96}, 32),  # within the noise
        ({16: 0.9}, 16),
        ({16: 0.9, 64: 0.8}, 64),
    ],
)
def test_on_a_cpu_4096_tokens_stay_unless_another_size_is_clearly_faster(solo_ranks, monkeypatch, factors, expected):
    def times(run, sizes):
        return [factors.get(size, 1.0) for size in sizes]

    monkeypatch.setattr(micro_batch, "seconds_per_sequence", times)
    trial = SimpleNamespace(run=None, max_seq_length=128)
    assert fastest_size(speed_engine(solo_ranks), trial, limit=8192) == expected


def test_on_a_cpu_too_slow_to_be_timed_the_default_stays(solo_ranks, monkeypatch):
    monkeypatch.setattr(micro_batch, "seconds_per_sequence", lambda run, sizes: [1.0, *[math.inf] * (len(sizes) - 1)])
    trial = SimpleNamespace(run=None, max_seq_length=128)
    assert fastest_size(speed_engine(solo_ranks), trial, limit=8192) == 32


def test_one_candidate_is_not_timed(solo_ranks):
    trial = SimpleNamespace(run=None, max_seq_length=100_000)
    assert fastest_size(speed_engine(solo_ranks), trial, limit=8192) == 1
    assert fastest_size(speed_engine(solo_ranks), SimpleNamespace(run=None, max_seq_length=128), limit=3) == 3


def test_ranks_with_other_times_choose_the_same(on_ranks, monkeypatch):
    def find(ranks):
        trial = SimpleNamespace(run=ranks.rank, max_seq_length=128)
        return fastest_size(speed_engine(ranks), trial, limit=64)

    times = {0: [1.0, 0.7, 1.0, 1.0], 1: [1.0, 1.1, 1.0, 0.6]}
    monkeypatch.setattr(micro_batch, "seconds_per_sequence", lambda run, sizes: times[run])
    assert on_ranks(2, find) == [64, 64]


@pytest.fixture
def find(tmp_path, monkeypatch):
    """A function that finds a size for a run's folder, and the sizes that it measures, one after the other."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measured = []

    def run(ranks, *folders, conditions=("any",), limit=32, trial=None):
        for folder in folders:
            (tmp_path / folder).mkdir(exist_ok=True)
        engine = SimpleNamespace(device=CPU, ranks=ranks)
        monkeypatch.setattr(micro_batch, "fastest_size", lambda *_: measured.pop(0))
        paths = [tmp_path / folder for folder in folders]
        return find_micro_batch_size(engine, trial, {"conditions": conditions}, limit, paths)

    run.measured = measured
    return run


def test_a_finding_is_kept_for_the_users_other_runs(find, solo_ranks, tmp_path):
    find.measured += [7, 9]
    assert [find(solo_ranks, "a"), find(solo_ranks, "b")] == [7, 7]
    assert find(solo_ranks, "b", conditions=("others",)) == 9
    content = json.loads((tmp_path / "cache/ds_roberta" / FINDINGS_NAME).read_text())
    assert sorted(entry["micro_batch_size"] for entry in content.values()) == [7, 9]


def test_a_run_goes_on_with_its_own_size_whatever_the_cache_says(find, solo_ranks, tmp_path):
    find.measured += [7, 9]
    find(solo_ranks, "a")
    (tmp_path / "cache/ds_roberta" / FINDINGS_NAME).unlink()
    assert find(solo_ranks, "b") == 9
    assert find(solo_ranks, "a") == 7
    assert find(solo_ranks, "c", "a") == 7  # from the checkpoint of another run
    assert find(solo_ranks, "c") == 7


@pytest.mark.parametrize("content", ["", "{", "[]", '{"KEY": 3}', '{"KEY": {"micro_batch_size": "x"}}'])
def test_a_damaged_cache_is_measured_again_and_replaced(find, solo_ranks, tmp_path, content):
    find.measured += [7, 9]
    find(solo_ranks, "a")
    path = tmp_path / "cache/ds_roberta" / FINDINGS_NAME
    (key,) = json.loads(path.read_text())
    path.write_text(content.replace("KEY", key))
    assert [find(solo_ranks, "b"), find(solo_ranks, "c")] == [9, 9]


def test_a_home_that_cannot_be_written_is_no_error(find, solo_ranks, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    find.measured += [7, 9]
    assert [find(solo_ranks, "a"), find(solo_ranks, "a"), find(solo_ranks, "b")] == [7, 7, 9]


def test_ranks_take_the_main_ones_finding(on_ranks, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(micro_batch, "fastest_size", lambda engine, *_: engine.ranks.min(engine.ranks.rank + 5))

    def find_on(ranks):
        folder = tmp_path if ranks.is_main else tmp_path / "nowhere"
        return find_micro_batch_size(SimpleNamespace(device=CPU, ranks=ranks), None, {}, 32, [folder])

    assert on_ranks(3, find_on) == [5, 5, 5]
    assert on_ranks(3, find_on) == [5, 5, 5]


def test_a_size_found_before_is_tried_on_a_gpu(on_ranks, monkeypatch, tmp_path):
    """Another process may have taken memory since: on one rank it no longer fits, so all look for a size again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    capacities = [[20, 20], [20, 12], [20, 12]]

    def find_on(ranks):
        capacity = capacities[0][ranks.rank]
        tried = []

        def fits(size):
            tried.append(size)
            return size <= capacity

        engine = SimpleNamespace(device=SimpleNamespace(type="cuda"), ranks=ranks)
        size = find_micro_batch_size(engine, SimpleNamespace(fits=fits, max_seq_length=8), {}, 32, [tmp_path])
        return size, tried[0], len(tried)

    assert [found[0] for found in on_ranks(2, find_on)] == [20, 20]
    capacities.pop(0)
    assert [found[:2] for found in on_ranks(2, find_on)] == [(12, 20), (12, 20)]
    capacities.pop(0)
    assert on_ranks(2, find_on) == [(12, 12, 1), (12, 12, 1)]


def test_conditions_tell_apart_what_changes_the_size():
    def conditions(world_size=1, mlm_probability=0.15, **changes):
        arguments = {
            "precision": "bf16",
            "limit": 32,
            "max_seq_length": LENGTH,
            "model": MODEL,
            "objective": "mlm",
            **changes,
        }
        config = {"zero_optimization": {"stage": arguments.pop("stage", 2)}}
        if layers := arguments.pop("number_checkpoints", None):
            config["activation_checkpointing"] = {"number_checkpoints": layers}
        ranks = SimpleNamespace(world_size=world_size, gather=lambda value: [value] * world_size)
        engine = SimpleNamespace(device=CPU, ranks=ranks, config=config, deepspeed_version="0.19.8")
        masking = MaskingConfig(mlm_probability=mlm_probability)
        return json.dumps(finding_conditions(engine, masking=masking, **arguments), sort_keys=True)

    variants = [{"stage": 3}, {"precision": "fp32"}, {"limit": 16}, {"max_seq_length": 8}]
    variants.append({"model": model_config("small", 100, LENGTH)})
    variants.append({"model": replace(MODEL, hidden_act="relu")})
    variants += [{"number_checkpoints": 1}, {"number_checkpoints": 2}]
    variants += [{"objective": "rts"}, {"mlm_probability": 0.3}, {"world_size": 2}]
    assert len({conditions(), *[conditions(**variant) for variant in variants]}) == 12
    assert "hidden_act" not in conditions()  # what was found before there were others holds
