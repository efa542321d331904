"""What each choice of the fast recipe is worth: the held-out loss of runs that differ from it in one thing.

    python -m benchmarks.recipe --data_dir data/wiki --model nano --max_tokens 1500000

Every run is the real command, on as many tokens, with each of the seeds. Losses are on 15% masks. A run's loss is kept
in the folder of results as soon as it is known, and the same command again goes on with what is missing. Ends with a
Markdown table of what is finished; `--variants ''` only makes it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY, commit, cpu_model, publish, versions
from ds_roberta.command_line import ArgumentParser, positive, run_command, several
from ds_roberta.config import PRESETS
from ds_roberta.data.shards import Corpus
from ds_roberta.errors import UserError
from ds_roberta.files import read_json, write_json
from ds_roberta.training.recipes import RECIPES

FAST = REPOSITORY / "ds_configs/fast.json"
ADAMW = {"type": "AdamW", "params": {"lr": 2e-3, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.01}}


@dataclass(frozen=True)
class Variant:
    """How a run differs from the recipe.

    Attributes:
        options: of `launch/pretrain.py`.
        config: values of the DeepSpeed JSON.
        factors: what the optimizer's values for the model's width are multiplied by.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)


BASE = "nothing: the recipe"
VARIANTS = {
    BASE: Variant(),
    "random attention": Variant({"initial_attention": "random"}),
    "no initial bias": Variant({"initial_bias": "zero"}),
    "AdamW instead of Muon": Variant(config={"optimizer": ADAMW}),
    "half of Muon's rate": Variant(factors={"muon_lr": 0.5}),
    "twice Muon's rate": Variant(factors={"muon_lr": 2}),
    "half of Adam's rate": Variant(factors={"adam_lr": 0.5}),
    "twice Adam's rate": Variant(factors={"adam_lr": 2}),
    "8 sequences a step": Variant({"train_batch_size": 8}),
    "32 sequences a step": Variant({"train_batch_size": 32}),
    "15% masks": Variant({"mlm_probability": 0.15, "mlm_probability_end": 0.15}),
    "40% masks to the end": Variant({"mlm_probability": 0.4, "mlm_probability_end": 0.4}),
    "dropout 0.1": Variant({"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}),
    "no warm-up": Variant({"warmup_steps": 0}),
    "decay over 60%": Variant({"decay_steps": "60%"}),
    "64 tokens in the first half": Variant({"max_seq_length_schedule": "0:64,50%:128"}),
    "no weight decay": Variant(factors={"weight_decay": 0}),
    "no clipping": Variant(config={"gradient_clipping": 0.0}),
}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder made by 'preprocess shard'")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--max_seq_length", type=positive, default=128)
    parser.add_argument("--max_tokens", type=positive, default=1_500_000, help="of each run (default: %(default)s)")
    parser.add_argument("--eval_sequences", type=positive, default=512)
    parser.add_argument("--seeds", type=several(int), default=(0, 1, 2))
    parser.add_argument("--variants", default=",".join(VARIANTS), help="which to run (default: all)")
    parser.add_argument(
        "--results", type=Path, default=REPOSITORY / "benchmarks/results/recipe", help="folder of the losses"
    )
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/recipe.md")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that this runs
    run_command(lambda: compare(parser.parse_args()))


def compare(options: argparse.Namespace) -> None:
    names = [name for name in options.variants.split(",") if name]
    if unknown := set(names) - VARIANTS.keys():
        raise UserError(f"--variants names {min(unknown)!r}: choose from {', '.join(VARIANTS)}")
    for seed in options.seeds:
        for name in names:
            measure(options, name, seed)
    publish(report(options), options.output)


def result_path(options: argparse.Namespace, name: str, seed: int) -> Path:
    case = f"{options.model}-{options.max_tokens}-{'-'.join(re.findall(r'[A-Za-z0-9.]+', name))}-seed{seed}"
    return Path(options.results / f"{case}.json")


def measure(options: argparse.Namespace, name: str, seed: int) -> None:
    """Run what has no result yet, and keep its last held-out loss."""
    path = result_path(options, name, seed)
    if path.exists():
        return
    output = path.with_suffix("")
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(REPOSITORY / "launch/pretrain.py"), "--recipe", "fast", *arguments(options, name)]
    command += ["--seed", str(seed), "--output_dir", str(output)]
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    if code:
        raise UserError(f"exit code {code}: {' '.join(command)}")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    loss = [row["eval_loss"] for row in rows if "eval_loss" in row][-1]
    print(f"{name}, seed {seed}: {loss:.3f}", flush=True)
    write_json(path, {"eval_loss": loss, "commit": commit()})


def arguments(options: argparse.Namespace, name: str) -> list[str]:
    """The command's options for a variant; its DeepSpeed JSON is written where it differs from the recipe's."""
    variant = VARIANTS[name]
    given: dict[str, Any] = {
        key: getattr(options, key) for key in ("data_dir", "model", "max_seq_length", "max_tokens")
    }
    given |= {"eval_sequences": options.eval_sequences, "eval_interval": 1_000_000, "save_interval": 1_000_000}
    given |= {"loss_plateau": "off", **variant.options}
    if variant.config or variant.factors:
        content = read_json(FAST)
        params = content["optimizer"]["params"] | RECIPES["fast"].params_for(PRESETS[options.model].hidden_size)
        content["optimizer"]["params"] = params | {key: params[key] * by for key, by in variant.factors.items()}
        content |= variant.config
        path = result_path(options, name, 0).with_suffix(".deepspeed.json")
        write_json(path, content)
        given["deepspeed_config"] = path
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def report(options: argparse.Namespace) -> list[str]:
    found = {
        name: {seed: read_json(path) for seed in options.seeds if (path := result_path(options, name, seed)).exists()}
        for name in VARIANTS
    }
    losses = {name: [each["eval_loss"] for each in by_seed.values()] for name, by_seed in found.items() if by_seed}
    means = {name: statistics.fmean(values) for name, values in losses.items()}
    table = ["| differs in | held-out loss, by seed | mean | beside the recipe |", "|---|---|---|---|"]
    for name, values in losses.items():
        difference = f"{means[name] - means[BASE]:+.3f}" if BASE in means and name != BASE else ""
        table.append(f"| {name} | {', '.join(f'{value:.3f}' for value in values)} | {means[name]:.3f} | {difference} |")
    commits = {of_seed["commit"] for by_seed in found.values() for of_seed in by_seed.values()}
    vocabulary = Corpus.open(options.data_dir).manifest.tokenizer.vocab_size
    return [
        "# What each choice of the fast recipe is worth",
        "",
        f"{cpu_model()}, one thread. {versions('torch', 'deepspeed')} The runs were made at "
        f"{', '.join(sorted(commits)) or 'none'}.",
        "",
        f"{options.model} on {options.data_dir.name}, {vocabulary:,} ids, {options.max_seq_length} tokens, "
        f"{options.max_tokens / 1e6:g} million tokens a run, `python -m benchmarks.recipe`. Lower is better; a variant "
        "may have fewer seeds than others.",
        "",
        *table,
    ]


if __name__ == "__main__":
    main()
