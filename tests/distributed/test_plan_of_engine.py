"""The cost model's formulas against what a real engine holds and sends, on CPUs."""

from pathlib import Path

import pytest
from groups import run_group
from plan_worker import MICRO_STEPS, MODEL

from benchmarks.cost_model import PERSISTENT_ELEMENTS, engine_bytes, meta_model, wire_bytes

pytestmark = pytest.mark.timeout(600)
WORKER = Path(__file__).with_name("plan_worker.py")
SIZES = [parameter.numel() for parameter in meta_model(MODEL).parameters()]
TOTAL, PERSISTENT = sum(SIZES), sum(size for size in SIZES if size <= PERSISTENT_ELEMENTS)
BYTES = {"torch.float32": 4, "torch.bfloat16": 2}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_engine_holds_and_sends_what_the_plan_says(tmp_path, world_size):
    findings = run_group(world_size, "-", tmp_path, tmp_path, worker=WORKER)[f"plan-{world_size}"]
    for stage in (1, 2, 3):
        found = findings[str(stage)]
        planned = engine_bytes(TOTAL, PERSISTENT, stage, "bf16", world_size)
        assert found["fp32"] == pytest.approx(planned["gradients"] + planned["optimizer"], rel=0.01)
        if (stage, world_size) != (3, 1):  # alone, stage 3 may keep what it gathered: it has no second copy of it
            assert found["weights"] == pytest.approx(planned["weights"], rel=0.01)
        sent = 0.0
        for name, elements in found["sent"].items():
            operation, dtype = name.split()
            rounds = 2 if "allreduce" in operation else 1  # a ring's all-reduce is a reduce-scatter and a gathering
            sent += rounds * BYTES.get(dtype, 0) * elements * (world_size - 1) / world_size
        assert sent == pytest.approx(wire_bytes(TOTAL, PERSISTENT, stage, world_size, MICRO_STEPS), rel=0.01)
