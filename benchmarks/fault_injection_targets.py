"""The commands that are killed in `fault_injection`: small runs, the phases that are aimed at, and what is compared."""

from __future__ import annotations

import json
import random
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY
from benchmarks.interrupted import Phase, Watch, run_to_its_end
from ds_roberta.files import file_checksum, read_json, write_json
from ds_roberta.model.export import MODEL_CARD
from ds_roberta.training.checkpoint import CHECKPOINTS_FOLDER
from ds_roberta.training.metrics import MACHINE_COLUMNS, METRICS_NAME

STEPS, SAVE_INTERVAL = 30, 3
START, STEP, BETWEEN, END = "start", "step", "between", "end"
"""What a command is in while it is in none of its phases."""
INDEX = Phase("index", "data/index/.*")
SAVE = Phase("save", f"run/{CHECKPOINTS_FOLDER}/.global_step*", at_most=2)
EXPORT = Phase("export", "run/.hf.*")
UNIT = Phase("unit", ".data.partial/*/scratch/*", at_most=2)
PUBLISHING = Phase("publishing", ".data.partial/*/data/*manifest.json*")
REPLACING = Phase("export", ".exported.*")
TUNING_SAVE = Phase("save", ".tuned.runs/*/*/trainer/checkpoint-*", until="trainer_state.json", at_most=2)
WRITING = Phase("writing", ".tuned.partial")
_TEXTS = ("anne-of-green-gables", "jos-boys", "little-men", "rilla-of-ingleside")
_TUNED_ON = 160
_VOCABULARY, _LENGTH = 600, 32
_SIZES = {
    "model_type": "roberta",
    "vocab_size": _VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": _LENGTH + 2,
}
BATCHES = {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4}  # "auto" depends on the time that trials take


@dataclass(frozen=True)
class Target:
    """A command that is interrupted and started again.

    Attributes:
        words: the command, to be run in a working folder.
        inputs: names in that folder of what the command reads, and of what it replaces.
        outputs: patterns of the files that must be equal at the end, in the working folder.
        phases: what is seen of it from outside, in its order.
        started: the phase whose first occurrence ends the start.
        aims: what a kill is aimed at, by phases, START and STEP; the first ones matter most.
        outside: what it is in outside of its phases, once `reports` is found in what it prints.
        stops: whether it saves and exits when it gets SIGTERM or SIGUSR1.
    """

    name: str
    words: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    phases: tuple[Phase, ...]
    started: Phase
    aims: tuple[str, ...]
    processes: int = 1
    outside: str = STEP
    reports: str = ""
    stops: bool = False

    def aimed(self, count: int) -> list[str]:
        """The `count` most important aims, in the order in which the command comes to them."""
        order = [phase.name for phase in self.phases]
        order.insert(order.index(self.started.name), START)
        chosen = list(self.aims[:count])
        return sorted(chosen, key=lambda aim: order.index(SAVE.name if aim == STEP else aim))


@dataclass
class Unbroken:
    """A target's run that nothing disturbed: what it wrote, and how long its phases took."""

    files: dict[str, Any]
    spans: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def shows(self, target: Target, aim: str) -> bool:
        """Whether `moment` knows when: whether the watching noticed a phase, however short it was."""
        return bool(self.spans[{START: target.started.name, STEP: SAVE.name}.get(aim, aim)])

    def moment(self, target: Target, aim: str, chosen: random.Random) -> tuple[Phase | None, int, float]:
        """When to act: after a phase has begun for the n-th time (None: after the start), and seconds after that."""
        if aim == START:
            return None, 0, chosen.uniform(0, self.spans[target.started.name][0][0])
        if aim == STEP:
            begins = [begin for begin, _ in self.spans[SAVE.name]]
            between = statistics.median(after - before for before, after in pairwise(begins))
            return _phase(target, SAVE.name), chosen.randint(1, 2), chosen.uniform(0, between)
        phase = _phase(target, aim)
        spans = self.spans[aim]
        # What happens several times is met at any time; the index is two files for each split, one after another.
        seconds = (
            statistics.median(end - begin for begin, end in spans) if phase.at_most > 1 else spans[-1][1] - spans[0][0]
        )
        return phase, chosen.randint(1, min(phase.at_most, len(spans))), chosen.uniform(0, seconds)


def _phase(target: Target, name: str) -> Phase:
    return next(phase for phase in target.phases if phase.name == name)


def targets(processes: int) -> dict[str, Target]:
    """All targets, by name; `processes` are those of the pretraining."""
    python, launch = sys.executable, REPOSITORY / "launch"
    pretrain = [python, str(launch / "pretrain.py"), "--deepspeed_config", "deepspeed.json", "--data_dir", "data"]
    pretrain += f"--model sizes.json --max_seq_length {_LENGTH} --learning_rate 1e-3 --warmup_steps 2".split()
    pretrain += f"--max_steps {STEPS} --save_interval {SAVE_INTERVAL} --eval_interval 5 --eval_sequences 64".split()
    shard = [python, "-m", "preprocessing.cli", "shard", "--tokenizer", "tokenizer", "--output", "data", "--input"]
    shard += [f"{name}={REPOSITORY / f'examples/corpus/{name}.txt'}" for name in _TEXTS]
    shard += ["--validation_fraction", "0.05", "--dedup", "exact", "--workers", "2"]
    export = [python, str(launch / "export_hf.py"), "--checkpoint", "run", "--output", "exported"]
    tune = [python, str(launch / "finetune.py"), "--model", "exported", "--task", "classification"]
    tune += ["--data", "train=labelled.jsonl", "validation=labelled.jsonl", "--output_dir", "tuned"]
    tune += ["--learning_rate", "1e-3", "--num_train_epochs", "12"]
    last = f"run/{CHECKPOINTS_FOLDER}/global_step{STEPS}/**/*"
    pointers = (f"run/{CHECKPOINTS_FOLDER}/latest", f"run/{CHECKPOINTS_FOLDER}/best")
    step_and_save = (STEP, SAVE.name)
    found = (
        Target(
            "preprocessing", tuple(shard), ("tokenizer",), ("data/**/*",), (UNIT, PUBLISHING), UNIT,
            (UNIT.name, PUBLISHING.name, START, UNIT.name), outside=BETWEEN, reports="tokenizer backend",
        ),
        Target(
            "pretraining", (*pretrain, "--output_dir", "run"), ("data", "sizes.json", "deepspeed.json"),
            (f"run/{METRICS_NAME}", last, *pointers, "run/hf/**/*", "data/**/*"), (INDEX, SAVE, EXPORT), SAVE,
            (*step_and_save, INDEX.name, EXPORT.name, *step_and_save, START, *step_and_save),
            processes, reports=r"step \d+/\d+", stops=True,
        ),
        Target(
            "export", tuple(export), ("run", "exported"), ("exported/**/*",), (REPLACING,), REPLACING,
            (REPLACING.name, REPLACING.name), outside=END, reports="exported ",
        ),
        Target(
            "fine-tuning", tuple(tune), ("exported", "labelled.jsonl"), ("tuned/**/*",), (TUNING_SAVE, WRITING),
            TUNING_SAVE, (*step_and_save, WRITING.name, *step_and_save),
            reports=r"continues from step|epoch \d+ of", stops=True,
        ),
    )  # fmt: skip
    return {target.name: target for target in found}


class Ground:
    """The inputs of all targets and their unbroken runs, made in a folder as far as they are asked for."""

    def __init__(self, folder: Path, targets: Mapping[str, Target], deepspeed_config: Path):
        self.folder, self._targets, self._deepspeed_config = folder, targets, deepspeed_config
        self._unbroken: dict[str, Unbroken] = {}

    def unbroken(self, target: Target) -> Unbroken:
        """Run a target to its end, and the earlier ones that make its inputs."""
        for each in self._targets.values():
            if each.name not in self._unbroken:
                print(f"{each.name}: the unbroken run", flush=True)
                self._unbroken[each.name] = self._run(each)
            if each == target:
                break
        return self._unbroken[target.name]

    def _run(self, target: Target) -> Unbroken:
        unbroken, inputs = Unbroken({}), self.folder / "inputs"
        if not self._unbroken:
            self._write_inputs(inputs)
        if target.name == "export":  # it replaces an earlier checkpoint's: an old folder must not pass for a new one
            words = [*target.words]
            words[words.index("run")] = f"run/{CHECKPOINTS_FOLDER}/global_step{STEPS - SAVE_INTERVAL}"
            run_to_its_end(words, inputs)
        folder = self.copy(target, f"unbroken-{target.name}")
        watch = Watch(target.phases, folder)
        run_to_its_end(target.words, folder, target.processes, lambda run: unbroken.spans.update(watch.spans(run)))
        unbroken.files = dict(written(folder, target.outputs))
        for made in {"preprocessing": ("data",), "pretraining": ("run",)}.get(target.name, ()):
            shutil.copytree(folder / made, inputs / made)
        return unbroken

    def _write_inputs(self, inputs: Path) -> None:
        inputs.mkdir(parents=True)
        text = REPOSITORY / f"examples/corpus/{_TEXTS[0]}.txt"
        words = ["train-tokenizer", "--input", str(text), "--vocab_size", str(_VOCABULARY), "--output", "tokenizer"]
        run_to_its_end([sys.executable, "-m", "preprocessing.cli", *words], inputs)
        write_json(inputs / "sizes.json", _SIZES)
        write_json(inputs / "deepspeed.json", {**read_json(self._deepspeed_config), **BATCHES})
        lines = [line for line in text.read_text(encoding="utf-8").split("\n") if line.strip()][:_TUNED_ON]
        rows = (json.dumps({"text": line, "label": int(len(line) > 60)}) for line in lines)
        (inputs / "labelled.jsonl").write_text("\n".join(rows), encoding="utf-8")

    def copy(self, target: Target, name: str) -> Path:
        """A new working folder with the target's inputs."""
        folder = self.folder / name
        folder.mkdir()
        for each in target.inputs:
            source = self.folder / "inputs" / each
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / each)
        return folder


def written(folder: Path, outputs: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """What a run has written, by path: checksums, the metrics without times, the model card without the commit, which
    may change meanwhile; and every hidden file or folder."""
    for path in (path for pattern in outputs for path in folder.glob(pattern) if path.is_file()):
        content: Any = None
        if path.name == METRICS_NAME:
            rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            content = [{key: value for key, value in row.items() if key not in MACHINE_COLUMNS} for row in rows]
        elif path.name == MODEL_CARD:
            lines = path.read_text(encoding="utf-8").splitlines()
            content = [line for line in lines if not line.startswith("| commit of")]
        yield str(path.relative_to(folder)), content or file_checksum(path)
    for path in folder.rglob(".*"):
        yield str(path.relative_to(folder)), "left"


def differences(files: Mapping[str, Any], unbroken: Mapping[str, Any]) -> list[str]:
    """The paths of what a run has not written like the unbroken one."""
    return sorted(path for path in {*files, *unbroken} if files.get(path) != unbroken.get(path))
