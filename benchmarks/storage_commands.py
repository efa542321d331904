"""The commands whose disk is broken in `storage_faults`: what each writes, and how a broken run of it is judged."""

from __future__ import annotations

import csv
import gc
import json
import os
import random
import re
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.environment import REPOSITORY
from benchmarks.refused_calls import Disk, Ended, start
from ds_roberta.command_line import USER_ERROR_EXIT_CODE
from ds_roberta.errors import UserError
from ds_roberta.files import write_json
from ds_roberta.training.metrics import MACHINE_COLUMNS

_HOME, _TEMPORARY = "home", "tmp"
_SKIPPED = "skipped a checkpoint"
"""What a command reports that takes an earlier checkpoint because it cannot read the newest."""
_LEFT_ANYWHERE = rf"({_HOME}|{_TEMPORARY})(/.*)?"
_SIZES = {
    "vocab_size": 320,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 34,
    "model_type": "roberta",
}
_DEEPSPEED = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 4,  # "auto" would depend on the time that trials take
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.01}},
}
_PRETRAIN = (
    "--deepspeed_config deepspeed.json --data_dir data --model sizes.json --max_seq_length 32 "
    "--lr_scheduler_type polynomial --min_lr_ratio 1 "  # the rates of a step do not depend on the number of steps
    "--warmup_steps 1 --save_interval 2 --eval_interval 2 --eval_sequences 8 "
    "--output_dir"
)
_SHARD = "shard --input text.txt --tokenizer tokenizer --dedup exact --workers 1 --output"
_FINETUNE = "--model hf --task classification --data tasks --num_train_epochs 2 --learning_rate 1e-3 --output_dir"


@dataclass(frozen=True)
class Command:
    """A command, and what a refused run of it may leave.

    Attributes:
        script: below the repository.
        may_stay: a pattern of the paths that a refused run may leave, from which the same command continues.
        changes: a pattern of the earlier files that even a refused run may change.
        before: a command that makes what this one replaces or continues.
    """

    name: str
    script: str
    words: str
    may_stay: str = ""
    changes: str = ""
    before: Command | None = None

    def __call__(self) -> None:
        sys.argv = [str(REPOSITORY / self.script), *self.words.split()]
        here = Path.cwd()
        os.environ.update(
            HOME=str(here / _HOME), XDG_CACHE_HOME=str(here / _HOME / ".cache"), TMPDIR=str(here / _TEMPORARY)
        )
        tempfile.tempdir = None
        runpy.run_path(sys.argv[0], run_name="__main__")


_RUN = r"out(/.*)?|data/index(/.*)?"
_TOKENIZER = Command(
    "train-tokenizer", "preprocessing/cli.py", "train-tokenizer --input text.txt --vocab_size 320 --output out"
)
_FIRST = Command("shard", "preprocessing/cli.py", f"{_SHARD} out --validation_fraction 0.1", r"\.out\.partial(/.*)?")
_BEGUN = Command("pretrain", "launch/pretrain.py", f"{_PRETRAIN} out --max_steps 4", _RUN)
_EXPORT = Command("export", "launch/export_hf.py", "--checkpoint run --output out")
_EXPORT_EARLIER = replace(_EXPORT, words="--checkpoint run/checkpoints/global_step2 --output out")
_TUNE = Command("finetune", "launch/finetune.py", f"{_FINETUNE} out", r"\.out\.runs(/.*)?")
COMMANDS = (
    _TOKENIZER,
    _FIRST,
    replace(_FIRST, name="shard, replacing", before=replace(_FIRST, words=f"{_SHARD} out --validation_fraction 0.3")),
    _BEGUN,
    replace(
        _BEGUN, name="pretrain, resuming", words=f"{_PRETRAIN} out --max_steps 6",
        changes=r"out/(metrics\.jsonl|config\.json|hf/.*|checkpoints/(latest|best))", before=_BEGUN,
    ),
    _EXPORT,
    replace(_EXPORT, name="export, replacing", before=_EXPORT_EARLIER),
    _TUNE,
    replace(_TUNE, name="finetune, replacing", before=replace(_TUNE, words=f"{_FINETUNE} out --seeds 1")),
    Command("predict", "launch/predict.py", "--model tuned --input tasks/validation.csv --output out.jsonl"),
    Command(
        "evaluate", "launch/evaluate.py",
        "perplexity --model hf --data data --max_seq_length 32 --eval_sequences 8 --json out.json",
        r"data/index(/.*)?",
    ),
    Command("report", "launch/report.py", "run tuned --output out.html"),
)  # fmt: skip


def import_all() -> None:
    """Import what the commands import in their course, so that a forked process need not."""
    import transformers.models.roberta.modeling_roberta
    import transformers.trainer  # noqa: F401

    import preprocessing.cli  # noqa: F401

    gc.freeze()  # DeepSpeed collects garbage often, half a second each time if it looks at all that is imported


@dataclass(frozen=True)
class Ground:
    """A folder with what the commands read, and places for broken runs and logs beside it."""

    base: Path

    @property
    def work(self) -> Path:
        """Where every run happens: paths are part of what a command records."""
        return self.base / "work"

    @property
    def logs(self) -> Path:
        return self.base / "logs"

    def run(self, command: Callable[[], None], disk: Disk | None = None) -> Ended:
        for name in (_HOME, _TEMPORARY):
            (self.work / name).mkdir(exist_ok=True)
        return start(command, self.work, self.logs, watched=disk is not None).ended(disk)

    def run_both(self, command: Callable[[], None], delay: float) -> tuple[Ended, Ended]:
        """Run a command twice, the second from `delay` seconds after the first on."""
        for name in (_HOME, _TEMPORARY):
            (self.work / name).mkdir(exist_ok=True)
        first = start(command, self.work, self.logs, name="first")
        time.sleep(delay)
        second = start(command, self.work, self.logs, name="second")
        return first.ended(), second.ended()

    def finish(self, command: Command) -> None:
        """Run a command that must succeed."""
        ended = self.run(command)
        if ended.code != 0:
            raise UserError(f"{command.name} ended with exit code {ended.code} by itself: {ended.errors[-2000:]}")

    def prepare(self) -> None:
        """Make text, tokenizer, data, a run of four steps, its export, a fine-tuned model and tables."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(exist_ok=True)
        words = random.Random(0)
        vocabulary = ["".join(words.choices("aeioubdklmnprst", k=words.randint(2, 7))) for _ in range(400)]
        documents = [" ".join(words.choices(vocabulary, k=words.randint(5, 60))) + "." for _ in range(150)]
        (self.work / "text.txt").write_text("\n\n".join([*documents, documents[0]]) + "\n", encoding="utf-8")
        write_json(self.work / "sizes.json", _SIZES)
        write_json(self.work / "deepspeed.json", _DEEPSPEED)
        (self.work / "tasks").mkdir()
        for split, rows in (("train", documents[:32]), ("validation", documents[32:48])):
            with (self.work / f"tasks/{split}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([["text", "label"], *([text, str(len(text) % 2)] for text in rows)])
        for command, result in ((_TOKENIZER, "tokenizer"), (_FIRST, "data"), (_BEGUN, "run"), (_EXPORT, "hf"),
                                (_TUNE, "tuned")):  # fmt: skip
            self.finish(command)
            (self.work / "out").rename(self.work / result)
            shutil.rmtree(self.work / "data/index", ignore_errors=True)
        self._put("common")

    def _put(self, name: str) -> None:
        """Keep the work folder under a name; what the commands need of a home is not a part of it."""
        for place in (_HOME, _TEMPORARY):
            shutil.rmtree(self.work / place)
        self.work.rename(self.base / name)

    def begin(self, name: str) -> None:
        """Make the work folder what was kept under a name."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.base / name, self.work, symlinks=True)

    def before(self, command: Command) -> str:
        """The name of what a command begins with."""
        if command.before is None:
            return "common"
        name = re.sub(r"\W+", "-", command.name)
        if not (self.base / name).exists():
            self.begin("common")
            self.finish(command.before)
            self._put(name)
        return name


@dataclass(frozen=True)
class Unbroken:
    """What a run without faults began with, and what it left."""

    command: Command
    name: str
    first: Mapping[str, bytes]
    last: Mapping[str, bytes]

    @classmethod
    def of(cls, ground: Ground, command: Command) -> Unbroken:
        name = ground.before(command)
        ground.begin(name)
        first = content(ground.work)
        ground.finish(command)
        last = content(ground.work)
        ground.begin(name)
        ground.finish(command)
        if differing := sorted(_differing(last, content(ground.work))):
            raise UserError(f"two unbroken runs of {command.name} differ in {', '.join(differing)}")
        return cls(command, name, first, last)

    def problems(self, ground: Ground, ended: Ended) -> Iterator[str]:
        """What is wrong after a run with a fault; it is then repeated without one."""
        now = content(ground.work)
        if ended.code is None:
            yield "hung"
        elif ended.code == USER_ERROR_EXIT_CODE:
            yield from errors_of(ended)
            changed = [path for path in _differing(self.first, now) & self.first.keys()
                       if not re.fullmatch(self.command.changes, path)]  # fmt: skip
            if changed:
                yield f"changed {', '.join(sorted(changed)[:3])}"
            if left := [path for path in now.keys() - self.first.keys()
                        if not re.fullmatch(f"{self.command.may_stay}|{_LEFT_ANYWHERE}", path)]:  # fmt: skip
                yield f"left {', '.join(sorted(left)[:3])}"
        elif ended.code != 0:
            yield f"exit code {ended.code}: {' '.join(ended.errors.split()[-12:])}"
        elif _SKIPPED not in ended.errors:
            yield from self.differences(ground, "ended well")
        yield from self.repeated(ground)

    def differences(self, ground: Ground, when: str) -> Iterator[str]:
        """How the output differs from the unbroken run's."""
        if different := _differing(self.last, content(ground.work)):
            yield f"{when}: {', '.join(sorted(different)[:3])} differ"

    def repeated(self, ground: Ground) -> Iterator[str]:
        """What is wrong when the same command is given again, without a fault."""
        again = ground.run(self.command)
        if again.code != 0:
            yield f"the same command again: exit code {again.code}: {' '.join(again.errors.split()[-12:])}"
        else:
            yield from self.differences(ground, "the same command again")
        if _SKIPPED in again.errors:
            yield "a damaged checkpoint was left"


def errors_of(ended: Ended) -> Iterator[str]:
    """What is wrong with the errors of a run that was refused: they must be one line."""
    lines = re.findall(r"error: .*", ended.errors)
    if len(lines) != 1 or "Traceback" in ended.errors:
        yield f"{len(lines)} lines of error: {' '.join(ended.errors.split()[-12:])}"


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of all files by their paths, without what differs from one run to the next; folders are empty."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = b"" if path.is_dir() else _comparable(path.name, path.read_bytes())
    return found


def _comparable(name: str, text: bytes) -> bytes:
    try:
        if name == "metrics.jsonl":
            rows = [json.loads(line) for line in text.splitlines()]
            return json.dumps([{key: row[key] for key in row if key not in MACHINE_COLUMNS} for row in rows]).encode()
        if name == "config.json":
            return json.dumps({key: value for key, value in json.loads(text).items() if key != "peak"}).encode()
    except ValueError:  # cut off
        pass
    return text


def _differing(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> set[str]:
    names = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    return {name for name in names if not re.fullmatch(_LEFT_ANYWHERE, name)}
