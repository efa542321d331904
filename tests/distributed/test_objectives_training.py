"""Training by the other objectives in process groups: any partition gives the same step, any break the same run."""

from pathlib import Path

import numpy as np
import pytest
from groups import run_group

pytestmark = pytest.mark.timeout(600)  # the first test waits for two groups
WORKER = Path(__file__).with_name("objectives_worker.py")
LOSSES = {"pairs": ("loss", "mlm_loss", "nsp_loss"), "mlm-bow": ("loss", "mlm_loss", "bow_loss"), "rts": ("loss",)}
OBJECTIVES = tuple(LOSSES)


@pytest.fixture(scope="module")
def findings(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    output = tmp_path_factory.mktemp("findings")
    for processes in (1, 2):
        found = run_group(processes, ",".join(OBJECTIVES), corpus_folder, output, worker=WORKER)
    return found


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_does_not_depend_on_the_partition(findings, objective):
    reference = findings[f"{objective}-1"]["0-fp32"]["rows"]
    for world_size in (1, 2):
        for name, found in findings[f"{objective}-{world_size}"].items():
            assert [row["data"] for row in found["rows"]] == [row["data"] for row in reference], name
            tolerance = 1e-6 if "fp32" in name else 1e-3
            for row, expected in zip(found["rows"], reference, strict=True):
                for loss in LOSSES[objective]:
                    np.testing.assert_allclose(row["metrics"][loss], expected["metrics"][loss], tolerance, err_msg=name)
                np.testing.assert_allclose(row["grad_norm"], expected["grad_norm"], 10 * tolerance, err_msg=name)
                if objective == "rts":
                    assert row["sums"]["replaced"] == expected["sums"]["replaced"] > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_resumed_run_is_the_unbroken_one(findings, objective):
    for world_size in (1, 2):
        for found in findings[f"{objective}-{world_size}"].values():
            assert found["resumed"] == found["rows"][2:]
            assert found["same_end"]


def test_each_objective_trains_its_own_head(findings):
    heads = {
        objective: {name.split(".")[0] for name in findings[f"{objective}-2"]["3-fp32"]["parameters"]} - {"roberta"}
        for objective in OBJECTIVES
    }
    assert heads == {"pairs": {"lm_head", "next_sentence_head"}, "mlm-bow": {"lm_head"}, "rts": {"substitution_head"}}
