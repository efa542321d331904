"""Muon in the engine, in real process groups: any partition takes the same steps."""

from pathlib import Path

import numpy as np
import pytest
from groups import run_group

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def findings(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    output = tmp_path_factory.mktemp("findings")
    for processes in (2, 1, 3):
        found = run_group(processes, "muon", corpus_folder, output, worker=Path(__file__).with_name("muon_worker.py"))
    return found


@pytest.mark.parametrize(("kind", "tolerance"), [("fp32", 1e-6), ("bf16", 1e-3), ("fp16", 1e-4), ("rounded", 1e-3)])
def test_a_step_of_muon_does_not_depend_on_the_partition(findings, capsys, kind, tolerance):
    reference = findings["muon-1"]["0-fp32"]
    lines = ["ZeRO-precision  processes  loss     gradient  from torch"]
    for world_size in (1, 2, 3):
        for name, found in findings[f"muon-{world_size}"].items():
            if not name.endswith(kind):
                continue
            loss, norm = (
                float(np.max(np.abs(np.array(found[key]) / reference[key] - 1))) for key in ("loss", "grad_norm")
            )
            lines.append(f"{name:<15} {world_size:>9}  {loss:.1e}  {norm:.1e}   {found['from_torch']:.1e}")
            assert loss <= tolerance, (name, world_size)
            assert norm <= 10 * tolerance, (name, world_size)
    with capsys.disabled():
        print("", *lines, sep="\n")


def test_the_engine_takes_the_steps_of_the_optimizer_alone(findings):
    for world_size in (1, 2, 3):
        for stage in (0, 1, 2, 3):
            assert findings[f"muon-{world_size}"][f"{stage}-fp32"]["from_torch"] <= 1e-4, (world_size, stage)


def test_a_run_of_muon_goes_on_at_another_world_size_and_stage(findings):
    unbroken = findings["muon-2"]["0-fp32"]["loss"][1:]
    for world_size in (1, 2, 3):
        for stage in (0, 1, 2, 3):
            elastic = findings[f"muon-{world_size}"][f"{stage}-fp32"]["elastic"]
            np.testing.assert_allclose(elastic, unbroken, rtol=1e-5, err_msg=f"{world_size} {stage}")
