"""Training on pairs in real process groups: any partition gives the same step, any break the same run."""

from pathlib import Path

import numpy as np
import pytest
from groups import run_group

WORKER = Path(__file__).with_name("pairs_worker.py")


@pytest.fixture(scope="module")
def findings(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    output = tmp_path_factory.mktemp("findings")
    for processes in (1, 2):
        found = run_group(processes, "pairs", corpus_folder, output, worker=WORKER)
    return found


def test_a_step_on_pairs_does_not_depend_on_the_partition(findings):
    reference = findings["pairs-1"]["0-fp32"]["rows"]
    for world_size in (1, 2):
        for name, found in findings[f"pairs-{world_size}"].items():
            assert [row["data"] for row in found["rows"]] == [row["data"] for row in reference], name
            tolerance = 1e-6 if "fp32" in name else 1e-3
            for row, expected in zip(found["rows"], reference, strict=True):
                np.testing.assert_allclose(row["losses"][:2], expected["losses"][:2], rtol=tolerance, err_msg=name)
                np.testing.assert_allclose(row["grad_norm"], expected["grad_norm"], rtol=10 * tolerance, err_msg=name)


def test_a_resumed_run_on_pairs_is_the_unbroken_one(findings):
    for found in (case for cases in findings.values() for case in cases.values()):
        assert found["resumed"] == found["rows"][2:]
        assert found["same_end"]
        assert len(found["heads"]) == 4
