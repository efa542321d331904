"""What the monitors of a run hold, as their own readers tell it: the values of each series, a list at each step."""

import math
from collections import defaultdict

from ds_roberta.training.wandb_monitor import log_records


def expected_series(rows):
    """Rows of `metrics.jsonl` as `{series: {step: [value]}}`."""
    found = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for name, value in row.items():
            if name != "global_step":
                found[f"Train/{name}"][row["global_step"]].append(math.nan if value is None else value)
    return found


def csv_series(folder):
    import pandas

    found = {}
    for path in folder.glob("*.csv"):
        table = pandas.read_csv(path, float_precision="round_trip")
        name = path.stem.removeprefix("Train_")
        assert list(table.columns) == ["global_step", name]
        found[f"Train/{name}"] = {step: list(group[name]) for step, group in table.groupby("global_step")}
    return found


def tensorboard_series(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    found = defaultdict(lambda: defaultdict(list))
    for name in reader.Tags()["scalars"]:
        for event in reader.Scalars(name):
            found[name][event.step].append(event.value)
    return found


def wandb_series(folder, project="deepspeed", group=None):
    """Read all offline files in W&B's folder, which must belong to one run, in the order in which they are synced."""
    import json

    from wandb.proto import wandb_internal_pb2

    found, ids, last_step = defaultdict(lambda: defaultdict(list)), set(), -1
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        for data in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add((record.run.run_id, record.run.project, record.run.run_group))
            elif record.WhichOneof("record_type") == "history":
                items = [("/".join(item.nested_key) or item.key, item.value_json) for item in record.history.item]
                values = {name: json.loads(text) for name, text in items if not name.startswith("_")}
                step = values.pop("global_step")
                assert record.history.step.num == step > last_step  # W&B refuses another order
                last_step = step
                for name, value in values.items():
                    found[name][step].append(float(value))
    assert [(project, group or "")] == [(name, of) for _, name, of in ids]
    return found


def assert_same_series(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].keys() == values.keys(), name
        for step, (value,) in values.items():
            (read,) = found[name][step]
            assert math.isclose(read, value, rel_tol=tolerance) or (math.isnan(read) and math.isnan(value)), (
                name,
                step,
            )
