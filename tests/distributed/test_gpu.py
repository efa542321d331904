"""The same contracts on a GPU, against the CPU's findings."""

from pathlib import Path

import numpy as np
import pytest
import torch
from groups import run_group

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def findings(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return {
        "cpu": run_group(1, "partition", corpus_folder, tmp_path_factory.mktemp("cpu")),
        "cuda": run_group(
            1,
            "partition,resume,overflow,overflow_at_the_floor,trials,compilation,micro_batch",
            corpus_folder,
            tmp_path_factory.mktemp("cuda"),
            "cuda",
        ),
    }


def test_every_stage_and_precision_follows_the_cpu(findings):
    reference = [row["loss"] for row in findings["cpu"]["partition-1"]["0-fp32-4"]]
    for name, rows in findings["cuda"]["partition-1"].items():
        tolerance = 1e-5 if "fp32" in name else 1e-3
        np.testing.assert_allclose([row["loss"] for row in rows], reference, rtol=tolerance, err_msg=name)


def test_a_resumed_run_follows_the_unbroken_one(findings):
    for name, case in findings["cuda"]["resume-1"].items():
        for layout in ("portable", "deepspeed"):
            np.testing.assert_allclose(case[layout]["losses"], case["unbroken"], rtol=1e-5, err_msg=f"{name} {layout}")


def test_a_compiled_encoder_follows_the_one_that_is_not(findings):
    for name, losses in findings["cuda"]["compilation"].items():
        tolerance = 1e-5 if "fp32" in name else 1e-3
        np.testing.assert_allclose(losses["compiled"], losses["eager"], rtol=tolerance, err_msg=name)


def test_dropout_of_a_compiled_encoder_follows_the_seed(findings):
    for name, losses in findings["cuda"]["compilation"].items():
        np.testing.assert_allclose(losses["dropout_again"], losses["dropout"], rtol=1e-5, err_msg=name)
        assert not np.allclose(losses["dropout"], losses["compiled"], rtol=1e-5), name


def test_an_fp16_overflow_skips_the_step(findings):
    assert findings["cuda"]["overflow"] == {"skipped": True, "unchanged": True, "scales": [2.0**39]}


def test_an_overflow_that_no_loss_scale_cures_names_the_tensor(findings):
    found = findings["cuda"]["overflow_at_the_floor"]
    assert len(found) == 6
    assert all("that of lm_head.bias:" in message for _, message in found.values())


def test_the_automatic_micro_batch_fits_and_fills_the_memory(findings):
    found = findings["cuda"]["micro_batch"]
    assert 0.6 * found["free"] < found["peak"] < 0.95 * found["free"]


def test_trials_that_run_out_of_memory_leave_no_trace(findings):
    for name, found in findings["cuda"]["trials"].items():
        assert found["size"] == 3, name
