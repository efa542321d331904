"""The trainers that `benchmarks/throughput.py` compares, each in its own process:

    python -m benchmarks.throughput_contenders NAME CASE    # CASE is a `Case` as JSON

The process reads numbers of steps from its standard input, trains that many, and answers each number with a line of
JSON on its standard output. Data, model, optimizer, threads and allocator are the same for all; each contender imports
only what it needs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.utils.cpp_extension import CUDA_HOME

from benchmarks.environment import REPOSITORY
from benchmarks.throughput_case import Case
from ds_roberta.config import MaskingConfig, PackingConfig, Stage
from ds_roberta.process import keep_freed_memory
from ds_roberta.training.compilation import compiled_graphs

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY = 1e-4, (0.9, 0.98), 1e-6, 0.01
MATRIX_SIZES = (1024, 2048, 3072)
GPU_MATRIX_SIZES = (4096, 8192, 16384)
_MATRIX_SECONDS = 0.7
_MANY = 1_000_000


class Unavailable(Exception):
    """A contender cannot run here; the message says why."""


class Gate:
    """Called between steps: lets through as many steps as were ordered, then answers with what they cost."""

    def __init__(self, answer: Callable[[dict[str, Any]], None], tokens: int):
        self._answer, self._tokens = answer, tokens
        self._await_order()

    def __call__(self) -> None:
        """Call at the end of each step."""
        self._left -= 1
        if self._left:
            return
        seconds, wall = self._lap()
        gpu = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        tokens = self._tokens * self._ordered
        found = {"tokens": tokens, "seconds": seconds, "wall": wall, "peak_bytes": peak, "graphs": compiled_graphs()}
        self._answer(found)
        self._await_order()

    def _await_order(self) -> None:
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # ends the process from within another library's loop
        self._ordered = self._left = int(line)
        self._lap = stopwatch()


def stopwatch() -> Callable[[], tuple[float, float]]:
    """Start a clock; the returned function gives seconds of the device (a GPU, or all CPU threads) and of the wall."""
    if not torch.cuda.is_available():
        cpu, wall = time.process_time(), time.perf_counter()
        return lambda: (time.process_time() - cpu, time.perf_counter() - wall)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    wall = time.perf_counter()
    begin.record()

    def lap() -> tuple[float, float]:
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3, time.perf_counter() - wall

    return lap


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hf_parts(case: Case, attention: str) -> tuple[Any, Any, Any]:
    """Return transformers' model, the rows and the collator, as `run_mlm.py` makes them."""
    import datasets
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling, RobertaForMaskedLM

    from ds_roberta.model.export import hf_config

    config = hf_config(case.config)
    config._attn_implementation = attention
    tokenizer = AutoTokenizer.from_pretrained(Path(case.data) / "tokenizer")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MaskingConfig.mlm_probability)
    return RobertaForMaskedLM(config), datasets.load_from_disk(str(Path(case.folder) / "rows")), collator


def require_compiler() -> None:
    if device().type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise Unavailable("no compiler")


def run_mlm(
    case: Case, make_gate: Callable[[], Gate], precision: str, attention: str, torch_compile: bool = False
) -> None:
    """Train as transformers' `run_mlm.py`: Trainer's defaults, except the optimizer's numbers and clipping."""
    if torch_compile:
        require_compiler()
    if importlib.util.find_spec("accelerate") is None:
        raise Unavailable("accelerate is not installed")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class GateCallback(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.gate = make_gate()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.gate()

    model, rows, collator = hf_parts(case, attention)
    arguments = TrainingArguments(
        output_dir=str(Path(case.folder) / "trainer"),
        per_device_train_batch_size=case.micro_batch_size,
        gradient_accumulation_steps=case.micro_steps,
        max_steps=_MANY,
        use_cpu=device().type == "cpu",
        bf16=precision == "bf16",
        torch_compile=torch_compile,
        learning_rate=LEARNING_RATE,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=0.0,  # as for the others
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several, it would use all, with a batch for each
    Trainer(model, arguments, collator, rows, callbacks=[GateCallback()]).train()


def micro_batches(case: Case, rows: Any, collator: Any) -> Iterator[dict[str, torch.Tensor]]:
    loader = torch.utils.data.DataLoader(
        rows,
        case.micro_batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=collator,
        pin_memory=device().type != "cpu",
    )
    for batch in chain.from_iterable(repeat(loader)):
        yield {name: tensor.to(device(), non_blocking=True) for name, tensor in batch.items()}


def loop(case: Case, make_gate: Callable[[], Gate], attention: str, compiled: bool) -> None:
    """Train transformers' model by a plain loop, in bf16 by autocast."""
    if compiled:
        require_compiler()
    model, rows, collator = hf_parts(case, attention)
    model.to(device()).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )
    forward = torch.compile(model) if compiled else model
    batches = micro_batches(case, rows, collator)
    gate = make_gate()
    while True:
        for _ in range(case.micro_steps):
            with torch.autocast(device().type, torch.bfloat16):
                loss = forward(**next(batches)).loss
            (loss / case.micro_steps).backward()
        optimizer.step()
        optimizer.zero_grad()
        gate()


def deepspeed_loop(case: Case, make_gate: Callable[[], Gate], attention: str) -> None:
    """Train transformers' model with DeepSpeed as its tutorials show: ZeRO-1, bf16, `step` after each `backward`."""
    from ds_roberta.rendezvous import set_ranks

    if device().type != "cpu" and CUDA_HOME is None:
        raise Unavailable("there is no nvcc, with which DeepSpeed compiles its optimizer")
    set_ranks()
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # on a CPU it would be compiled for a minute
    deepspeed.init_distributed(verbose=False)
    model, rows, collator = hf_parts(case, attention)
    parameters = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
    if device().type == "cpu":
        parameters["torch_adam"] = True  # DeepSpeed's own is compiled first
    config = {
        "train_micro_batch_size_per_gpu": case.micro_batch_size,
        "gradient_accumulation_steps": case.micro_steps,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": parameters},
        "steps_per_print": None,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    batches = micro_batches(case, rows, collator)
    gate = make_gate()
    while True:
        for _ in range(case.micro_steps):
            engine.backward(engine(**next(batches)).loss)
            engine.step()
        gate()


def ours(
    case: Case, make_gate: Callable[[], Gate], precision: str, padded: bool | None = None, whole: bool = False
) -> None:
    """Train with the parts that `ds_roberta.training.run` makes, in steps like the trainer's.

    Args:
        padded: whether rows have padding; None: as in a run that is not told.
        whole: compile the whole model.
    """
    from ds_roberta.data.loader import Collator, Counts, LoaderStage, TrainLoader
    from ds_roberta.data.manifest import TRAIN_SPLIT
    from ds_roberta.data.masking import training_masker
    from ds_roberta.data.order import SampleOrder
    from ds_roberta.data.packing import open_index
    from ds_roberta.data.shards import Corpus
    from ds_roberta.deepspeed_config import DeepSpeedConfig
    from ds_roberta.model.objectives import MaskedLM
    from ds_roberta.training.compilation import compile_layers, compile_model, resolve_torch_compile
    from ds_roberta.training.device import init_distributed, on_gpu
    from ds_roberta.training.engine import Engine
    from ds_roberta.training.micro_batch import BatchPlan

    if precision == "fp16" and device().type == "cpu":
        raise Unavailable("no fp16 on a CPU")
    ranks = init_distributed()
    settings = DeepSpeedConfig.read(REPOSITORY / "ds_configs/zero1.json", case.train_batch_size, LEARNING_RATE)
    engine = Engine(MaskedLM(case.config), settings.resolved(precision, on_gpu()), ranks, 0)
    compiled = resolve_torch_compile("auto", settings.zero_stage, on_gpu())
    if whole:
        compile_model(engine.module)
    elif compiled:
        compile_layers(engine.module.roberta.encoder)
    engine.set_batch(BatchPlan(case.train_batch_size, case.micro_batch_size, ranks.world_size))
    corpus = Corpus.open(case.data)
    packed = open_index(corpus, TRAIN_SPLIT, PackingConfig(case.max_seq_length, case.packing))
    tokenizer = corpus.manifest.tokenizer
    if padded is None:
        padded = whole or compiled or on_gpu()
    masker = training_masker(MaskingConfig(), tokenizer, 0)
    collator = Collator(packed, masker, tokenizer, case.max_seq_length, padded=padded, on_gpu=on_gpu())
    stage = Stage(0, case.max_seq_length, case.train_batch_size)
    loader = TrainLoader([LoaderStage(stage, collator, SampleOrder(len(packed), 0), case.micro_batch_size)])
    gate = make_gate()
    for step, batches in enumerate(loader.steps(0, _MANY)):
        counts = Counts.total([batch.counts for batch in batches], ranks)
        loss_sum = torch.zeros((), device=engine.device)
        with engine.accumulation():
            for micro_step, batch in enumerate(batches):
                last = micro_step == len(batches) - 1
                loss_sum += engine.forward_backward(batch, counts, step, micro_step, last)["loss"]
        engine.step(LEARNING_RATE)
        loss_sum.item()
        gate()


def matrix_product(answer: Callable[[dict[str, Any]], None]) -> None:
    """Answer each order with the device's peak: the best rate of square bf16 matrix products of a few sizes."""
    from ds_roberta.training.peak import product_rate

    on_cpu = device().type == "cpu"
    sizes, clock = (MATRIX_SIZES, time.process_time) if on_cpu else (GPU_MATRIX_SIZES, time.perf_counter)
    while sys.stdin.readline():
        answer({"peak_flops": max(product_rate(device(), "bf16", size, _MATRIX_SECONDS, clock) for size in sizes)})


CONTENDERS: dict[str, tuple[str, str, Callable[[Case, Callable[[], Gate]], None]]] = {
    "ours-bf16": ("**ds_roberta**", "bf16", lambda c, g: ours(c, g, "bf16")),
    "ours-bf16-padded": ("ds_roberta, rows with padding", "bf16", lambda c, g: ours(c, g, "bf16", padded=True)),
    "ours-bf16-flat": ("ds_roberta, without padding", "bf16", lambda c, g: ours(c, g, "bf16", padded=False)),
    "ours-bf16-whole": ("ds_roberta, --torch_compile on", "bf16", lambda c, g: ours(c, g, "bf16", whole=True)),
    "ours-bf16-flat-whole": (
        "ds_roberta, without padding, --torch_compile on",
        "bf16",
        lambda c, g: ours(c, g, "bf16", padded=False, whole=True),
    ),
    "ours-fp16": ("**ds_roberta**", "fp16", lambda c, g: ours(c, g, "fp16")),
    "ours-fp32": ("**ds_roberta**", "fp32", lambda c, g: ours(c, g, "fp32")),
    "run_mlm-fp32": ("transformers Trainer (run_mlm), sdpa", "fp32", lambda c, g: run_mlm(c, g, "fp32", "sdpa")),
    "run_mlm-bf16": ("transformers Trainer (run_mlm), sdpa", "bf16", lambda c, g: run_mlm(c, g, "bf16", "sdpa")),
    "run_mlm-fp32-eager": (
        "transformers Trainer (run_mlm), eager",
        "fp32",
        lambda c, g: run_mlm(c, g, "fp32", "eager"),
    ),
    "run_mlm-bf16-eager": (
        "transformers Trainer (run_mlm), eager",
        "bf16",
        lambda c, g: run_mlm(c, g, "bf16", "eager"),
    ),
    "run_mlm-bf16-compiled": (
        "transformers Trainer (run_mlm), sdpa, torch_compile",
        "bf16",
        lambda c, g: run_mlm(c, g, "bf16", "sdpa", torch_compile=True),
    ),
    "loop-bf16": ("plain loop, sdpa", "bf16", lambda c, g: loop(c, g, "sdpa", False)),
    "loop-bf16-eager": ("plain loop, eager", "bf16", lambda c, g: loop(c, g, "eager", False)),
    "compiled-bf16": ("plain loop, sdpa, torch.compile", "bf16", lambda c, g: loop(c, g, "sdpa", True)),
    "compiled-bf16-eager": ("plain loop, eager, torch.compile", "bf16", lambda c, g: loop(c, g, "eager", True)),
    "deepspeed-bf16": ("DeepSpeed ZeRO-1, transformers model, sdpa", "bf16", lambda c, g: deepspeed_loop(c, g, "sdpa")),
    "deepspeed-bf16-eager": (
        "DeepSpeed ZeRO-1, transformers model, eager",
        "bf16",
        lambda c, g: deepspeed_loop(c, g, "eager"),
    ),
}
"""By name: a contender's description, its precision, and the function that trains until its gate ends the process."""
PEAK = "peak"


def main(name: str, case_json: str) -> NoReturn:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that output of libraries is not taken for an answer

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    case = Case(**json.loads(case_json))
    if device().type == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    try:
        if name == PEAK:
            matrix_product(answer)
        else:
            tokens = round(case.train_batch_size * case.max_seq_length * case.filled)
            CONTENDERS[name][2](case, lambda: Gate(answer, tokens))
    except Unavailable as reason:
        sys.stdin.readline()
        answer({"unavailable": str(reason)})
    os._exit(0)


def as_json(case: Case) -> str:
    return json.dumps(asdict(case))


if __name__ == "__main__":
    main(*sys.argv[1:])
