"""Print tables of what a run would cost: memory, communication, time and files.

    python -m benchmarks.plan --model large --gpus 512 --gpu h100
    python -m benchmarks.plan --model large --gpus 8 --gpu l4 --number_checkpoints 24    # recomputes all layers
    python -m benchmarks.plan --model my_architecture/config.json --gpus 8
    python -m benchmarks.plan --write      # the tables of docs/scaling.md

Nothing runs on a GPU: `cost_model` says what is counted, what is computed and what is assumed.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from benchmarks.cost_model import CONTEXT_BYTES, GPUS, LINK_SHARE, Case, Plan, plan
from benchmarks.environment import REPOSITORY
from ds_roberta.command_line import ArgumentParser, positive, positive_number, run_command, whole_number
from ds_roberta.config import PRESETS, SPECIAL_TOKENS_PER_SEQUENCE
from ds_roberta.data.byte_level import SPECIAL_TOKENS
from ds_roberta.data.manifest import InputPiece, ShardInfo
from ds_roberta.data.shards import CHUNK_BYTES
from ds_roberta.files import write_text
from ds_roberta.model.architecture import model_choice

DOCUMENT = REPOSITORY / "docs/scaling.md"
SHARDS, SHARD_BYTES = 10_000, 200_000_000
"""The corpus of `benchmarks.loader`'s largest manifest, with 10^12 tokens."""


def manifest_bytes() -> int:
    """Return the approximate size of the manifest of `SHARDS` shards of `SHARD_BYTES`, as indented JSON."""
    piece = InputPiece("corpus/part-00000.jsonl.zst", 0, SHARD_BYTES, 100_000)
    chunks = ("0" * 16,) * -(-SHARD_BYTES // CHUNK_BYTES)
    shard = ShardInfo("train/shard-00000.arrow", 100_000, 10**8, SHARD_BYTES, "0" * 32, chunks, (piece,))
    return SHARDS * len(json.dumps({"splits": {"train": [asdict(shard)]}}, indent=2))


def measured(name: str, pattern: str) -> str:
    """Return a figure from a report in benchmarks/results."""
    found = re.search(pattern, (REPOSITORY / "benchmarks/results" / name).read_text(encoding="utf-8"))
    assert found, f"{name} no longer has {pattern!r}"
    return found[1]


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value < 1e10 else f"{value / 1e9:.1f} GB"


def memory_table(cases: Sequence[Case]) -> str:
    head = ("model", "stage", "GPUs", "weights", "gradients", "optimizer", "gathered per pass", "activations per "
            "sequence", "largest micro-batch")  # fmt: skip
    rows = (
        (
            f"{each.case.model}, {each.parameters:,} parameters",
            str(each.case.zero_stage),
            f"{each.case.gpus:,}",
            *(gigabytes(each.state[name]) for name in ("weights", "gradients", "optimizer", "gathered")),
            gigabytes(each.activations_per_sequence),
            f"{each.largest_micro_batch:,}",
        )
        # A huge batch, so that the batch is not what limits the micro-batch.
        for each in (plan(replace(case, train_batch_size=case.gpus << 20)) for case in cases)
    )
    return table(head, rows)


def cost_table(cases: Sequence[Case]) -> str:
    head = ("model", "GPUs", "stage", "batch", "micro-batch x accumulation", "sent per step", "computing",
            "communicating", "tokens/s", "run", "GPU-hours", "limit")  # fmt: skip

    def row(each: Plan) -> Sequence[str]:
        case, batch, hours = each.case, each.batch, each.hours
        start = (case.model, f"{case.gpus:,}", str(case.zero_stage), f"{case.train_batch_size:,}")
        if batch is None:
            return (*start, *[""] * 7, each.verdict)
        return (
            *start,
            f"{batch.micro_batch_size} x {batch.accumulation_steps}",
            gigabytes(each.wire_bytes),
            f"{each.compute_seconds * 1e3:,.0f} ms",
            f"{each.communication_seconds * 1e3:,.1f} ms",
            f"{each.tokens_per_second / 1e6:,.2f} million",
            f"{hours / 24:,.1f} days" if hours >= 24 else f"{hours:,.1f} hours",
            f"{hours * case.gpus:,.0f}",
            each.verdict,
        )

    return table(head, (row(plan(case)) for case in cases))


def files_table(cases: Sequence[Case]) -> str:
    head = ("model", "GPUs", "checkpoint", "its files", "largest share of a rank", "seconds between saves",
            "tokens/s per GPU, share of one core's loader")  # fmt: skip
    loader = 1e6 * float(measured("loader.md", r"\| token \| ([\d.]+)"))

    def row(each: Plan) -> Sequence[str]:
        case, rate = each.case, each.tokens_per_second / each.case.gpus
        return (
            case.model,
            f"{case.gpus:,}",
            gigabytes(each.checkpoint_bytes),
            f"{each.checkpoint_files:,}",
            gigabytes(each.checkpoint_share),
            f"{case.save_interval * each.step_seconds:,.0f}",
            f"{rate:,.0f}, {rate / loader:.1%}",
        )

    return table(head, (row(each) for each in map(plan, cases) if each.batch))


def sources_table() -> str:
    stall = measured("checkpoint.md", r"\| base \| 1,497 MB \| [\d.]+ s \| ([\d.]+ s)")
    opening = measured("loader.md", r"their manifest[^|]*\| ([\d.]+ ms)")
    rows = [
        ("parameters, saved activations", "counted on the model (meta device)"),
        ("state of the engine, what it sends", "formulas, tested against a real engine on 1 and 2 CPU processes"),
        ("batches, ranks' checkpoint shares", "the program's own functions"),
        ("rate, memory and links of a GPU", "NVIDIA's data sheets"),
        (f"loader: {measured('loader.md', r'token . ([0-9.]+)')} million tokens a CPU-second", "measured"),
        (f"opening {SHARDS:,} shards of 200 MB: {opening}", "measured"),
        (f"their manifest: {manifest_bytes() / 1e6:,.0f} MB", "computed from the format"),
        (f"a save of base stops the loop for {stall} (a CPU, one process)", "measured"),
        ("utilisation 0.5", "assumed; not measured on a GPU cluster"),
        (f"{LINK_SHARE:.0%} of a link's rate; {CONTEXT_BYTES / 1e9:.0f} GB for CUDA and NCCL; nothing of the "
         "communication hidden; latency not counted", "assumed"),
    ]  # fmt: skip
    return table(("what", "source"), iter(rows))


def document_tables() -> dict[str, str]:
    """Return the tables of docs/scaling.md by the names of their markers."""
    models, counts = ("base", "large"), (8, 64, 512, 4_096)
    cases = [Case(model, gpus) for model in models for gpus in counts]
    large_batch: dict[str, Any] = {"train_batch_size": 32_768, "max_steps": 125_000}
    at_4096 = [
        replace(Case(model, 4_096, zero_stage=stage), **batch)
        for model in models
        for stage, batch in ((1, {}), (1, large_batch), (2, large_batch), (3, large_batch))
    ]
    return {
        "memory": memory_table(
            [Case(m, g, zero_stage=s) for m in models for g, s in ((8, 1), (8, 2), (8, 3), (512, 3))]
        ),
        "cost": cost_table(cases),
        "largest": cost_table(at_4096),
        "files": files_table(cases),
        "sources": sources_table(),
    }


def with_tables(text: str) -> str:
    """Return the document with new tables between its markers."""
    for name, content in document_tables().items():
        begin, end = f"<!-- {name}: python -m benchmarks.plan --write -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        assert end in rest, f"the document has no markers for {name}"
        text = f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"
    return text


def parse_case(words: Sequence[str] | None = None) -> Case | None:
    """Return the run that the command line describes, or None if it asks for the tables of the document."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables of docs/scaling.md instead")
    kinds = {"utilisation": positive_number, "interconnect": positive_number, "number_checkpoints": whole_number}
    choices: dict[str, list[Any]] = {"gpu": list(GPUS), "zero_stage": [1, 2, 3], "precision": ["bf16", "fp16"]}
    for field in fields(Case):
        if field.name == "model":
            shown = f"{', '.join(PRESETS)}, or a RobertaConfig: a config.json or its folder (default: {field.default})"
            parser.add_argument("--model", type=model_choice, default=field.default, help=shown)
            continue
        kind = kinds.get(field.name, positive if isinstance(field.default, int) else str)
        own = {"interconnect": "the GPU's", "max_seq_length": f"{field.default}, or fewer as the positions allow"}
        own["vocab_size"] = f"{field.default}, or the config's"
        shown = f"(default: {own.get(field.name, field.default)})"
        parser.add_argument(f"--{field.name}", type=kind, choices=choices.get(field.name), help=shown)
    given = {name: value for name, value in vars(parser.parse_args(words)).items() if value is not None}
    if given.pop("write"):
        return None
    if given.get("utilisation", 1) > 1:
        parser.error(f"--utilisation {given['utilisation']:g} is a share: give at most 1")
    for name, least in (("max_seq_length", SPECIAL_TOKENS_PER_SEQUENCE + 1), ("vocab_size", len(SPECIAL_TOKENS) + 1)):
        if given.get(name, least) < least:
            parser.error(f"--{name} {given[name]}: the least is {least}")
    case = Case(**given)
    layers = case.config.num_hidden_layers
    if case.number_checkpoints > layers:
        parser.error(f"--number_checkpoints {case.number_checkpoints}: the model has {layers} layers; give no more")
    if case.precision == "bf16" and not GPUS[case.gpu].bf16:
        parser.error(f"--gpu {case.gpu} has no bf16: give --precision fp16")
    if case.model in PRESETS:
        return case
    if "vocab_size" in given:
        parser.error("--vocab_size is in the config of --model: remove it")
    longest = case.config.max_length
    if given.get("max_seq_length", 0) > longest:
        parser.error(
            f"--max_seq_length {case.max_seq_length} is more than the {longest} that --model allows: give less"
        )
    return replace(case, max_seq_length=min(case.max_seq_length, longest))


def main() -> None:
    case = parse_case()
    if case is None:
        write_text(DOCUMENT, with_tables(DOCUMENT.read_text(encoding="utf-8")))
        return
    print("\n\n".join((memory_table([case]), cost_table([case]), files_table([case]), sources_table())))


if __name__ == "__main__":
    run_command(main)
