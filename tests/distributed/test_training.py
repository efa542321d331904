"""The training step's contracts, in real process groups: any partition gives the same step, any break the same run.

Each group of processes runs many configurations, because starting one costs ten seconds.
"""

from pathlib import Path

import numpy as np
import pytest
from groups import run_group

WORLD_SIZES = (1, 2, 3)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("findings")


@pytest.fixture(scope="module")
def findings(corpus_folder: Path, output: Path) -> dict:
    """Findings of all cases; two processes write the checkpoint from which the others go on."""
    for processes, cases in (
        (2, "partition,resume,elastic,overflow"),
        (1, "partition,elastic"),
        (3, "partition,elastic"),
    ):
        found = run_group(processes, cases, corpus_folder, output)
    return found


def losses(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows]


def cases(findings: dict, precision: str) -> dict[tuple[str, int], list[dict]]:
    return {
        (name, world_size): rows
        for world_size in WORLD_SIZES
        for name, rows in findings[f"partition-{world_size}"].items()
        if precision in name
    }


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 1e-3), ("fp16", 1e-4)])
def test_loss_and_gradient_norm_do_not_depend_on_the_partition(findings, precision, tolerance):
    reference = findings["partition-1"]["0-fp32-4"]
    for case, rows in cases(findings, precision).items():
        np.testing.assert_allclose(losses(rows), losses(reference), rtol=tolerance, err_msg=str(case))
        norms = [row["grad_norm"] for row in rows]
        np.testing.assert_allclose(
            norms, [row["grad_norm"] for row in reference], rtol=10 * tolerance, err_msg=str(case)
        )


def test_parameters_after_three_steps_do_not_depend_on_the_partition(findings, output):
    with np.load(output / "0-fp32-4-1.npz") as reference:
        for name, world_size in cases(findings, "fp32"):
            with np.load(output / f"{name}-{world_size}.npz") as final:
                for parameter in reference:
                    np.testing.assert_allclose(final[parameter], reference[parameter], atol=2e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_reduces_every_gradient_once_at_every_stage(findings, output, precision):
    with np.load(output / "0-fp32-4-1.npz") as parameters:
        gradient_elements = sum(value.size for value in parameters.values())
    for (name, world_size), rows in cases(findings, precision).items():
        if world_size > 1:
            for row in rows:  # besides: a norm, a flag, padding to equal partitions
                assert gradient_elements <= row["reduced"] <= gradient_elements + 1_000, (name, world_size)


@pytest.mark.parametrize("layout", ["portable", "deepspeed"])
def test_a_resumed_run_is_bit_identical_to_the_unbroken_one(findings, layout):
    for name, case in findings["resume-2"].items():
        resumed = case[layout]
        assert resumed["losses"] == case["unbroken"], name
        assert resumed["largest_difference"] == 0.0, name
        assert resumed["loss_scaler"][0] == resumed["loss_scaler"][1], name


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_run_goes_on_at_another_world_size_stage_and_micro_batch(findings, world_size):
    unbroken = findings["elastic-2"]["unbroken"]
    for name, found in findings[f"elastic-{world_size}"].items():
        np.testing.assert_allclose(found, unbroken, rtol=1e-5, err_msg=name)


def test_an_fp16_overflow_skips_the_step_and_halves_the_loss_scale(findings):
    assert findings["overflow"] == {"skipped": True, "unchanged": True, "scales": [2.0**39]}
