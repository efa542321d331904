"""Pretrain a RoBERTa encoder: `deepspeed launch/pretrain.py --deepspeed_config ds_configs/zero2.json`.

Works under the deepspeed launcher, torchrun, srun and mpirun, or alone as one process.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

# Threads that spin while they wait slow each other down on busy cores; read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from ds_roberta.command_line import ArgumentParser, run_command
from ds_roberta.config import (
    DEFAULT_DATA_DIR,
    LOSS_SPIKE_POLICIES,
    LR_DECAY_TYPES,
    LR_SCHEDULER_TYPES,
    MASKING_UNITS,
    OBJECTIVES,
    PACKING_FORMATS,
    PRESETS,
    TORCH_COMPILE,
)
from ds_roberta.distributed import leave
from ds_roberta.training.options import PretrainOptions
from ds_roberta.training.run import pretrain


def parse_arguments(words: Sequence[str] | None = None) -> PretrainOptions:
    defaults = {field.name: field.default for field in fields(PretrainOptions)}
    parser = ArgumentParser(description="Pretrain a RoBERTa encoder with DeepSpeed.", allow_abbrev=False)

    def add(name: str, kind: type, text: str, **keywords: object) -> None:
        default = keywords.setdefault("default", defaults[name])
        shown = "" if default in (None, argparse.SUPPRESS) else f" (default: {default})"
        parser.add_argument(f"--{name}", type=kind, help=text + shown, **keywords)  # type: ignore[arg-type]

    parser.add_argument("--deepspeed_config", type=Path, required=True, help="DeepSpeed JSON; see ds_configs/")
    add("data_dir", Path, "folder made by 'preprocess shard'", default=DEFAULT_DATA_DIR)
    add("output_dir", Path, "the run's folder (default: runs/MODEL)")
    add("model", str, "size (default: base with a GPU, tiny without)", choices=list(PRESETS))
    add("init_from", Path, "begin with this model instead: a transformers folder or one of our checkpoints")
    parser.add_argument(
        "--extend_positions",
        action="store_true",
        help="sequences longer than those of --init_from: the learned positions are repeated",
    )
    parser.add_argument(
        "--remap_token_embeddings",
        action="store_true",
        help="data of another tokenizer than that of --init_from: embeddings are copied by the tokens' texts",
    )
    add("max_seq_length", int, "tokens a sequence (default: the model's: 512, tiny 128)")
    add("max_seq_length_schedule", str, "STEP:LENGTH pairs, the last of --max_seq_length, such as 0:128,9000:512")
    add("objective", str, "mlm: predict masked tokens; rts: find randomly replaced ones", choices=OBJECTIVES)
    add("packing", str, "how documents become sequences", choices=PACKING_FORMATS)
    add("source_weights", str, "each source's share of the sequences: NAME=WEIGHT,… (default: all equally often)")
    add("masking", str, "what is masked as a whole", choices=MASKING_UNITS)
    add("masking_copies", int, "static masking: fixed masks of a sequence, by turns; BERT had 10 (default: dynamic)")
    add("mlm_probability", float, "share of the tokens to mask")
    add("mlm_probability_end", float, "share at the last step, reached in a straight line (default: no change)")
    add("max_steps", int, "optimizer steps of the run (default: the model's)")
    add("warmup_steps", int, "steps of linear warm-up (default: the model's share of max_steps)")
    add("lr_scheduler_type", str, "shape of the learning rate behind the warm-up", choices=LR_SCHEDULER_TYPES)
    add("lr_power", float, "exponent of polynomial (default: 1)")
    add("min_lr_ratio", float, "where polynomial, cosine and warmup_stable_decay end, over the peak (default: 0)")
    add("decay_steps", int, "last steps, in which warmup_stable_decay decays (default: a tenth of max_steps)")
    add("decay_type", str, "shape of that decay (default: 1-sqrt)", choices=LR_DECAY_TYPES)
    add("loss_spike", str, "what is done about a spike of the loss", choices=LOSS_SPIKE_POLICIES)
    add("loss_spike_threshold", float, "robust standard deviations above the recent median (default: 10)")
    add("seed", int, "of weights, order, masks and dropout")
    add("save_interval", int, "steps between checkpoints")
    add("eval_interval", int, "steps between evaluations on the held-out split")
    add("log_interval", int, "steps between rows of metrics.jsonl")
    add("keep_last", int, "newest checkpoints to keep; the one of the lowest held-out loss stays too")
    add("keep_every", int, "keep checkpoints of every multiple of so many steps, too (default: none)")
    parser.add_argument(
        "--save_deepspeed_checkpoint",
        action="store_true",
        help="at each save, also write one in DeepSpeed's own layout (deepspeed_checkpoints/); training waits for it",
    )
    add("eval_sequences", int, "held-out sequences to evaluate on, at most")
    add(
        "resume",
        str,
        "'auto': the newest good checkpoint of output_dir, if any; or a checkpoint's folder; one in DeepSpeed's own "
        "layout holds pickles, which can run code: name only one that you trust",
    )
    add("allow_change", str, "what may differ from the checkpoint's run, such as seed,masking.unit")
    add("train_batch_size", int, "overrides the JSON's")
    add("train_batch_size_schedule", str, "STEP:SIZE pairs, the last of the batch size, such as 0:1024,5000:8192")
    add("learning_rate", float, "overrides the JSON's peak")
    parser.add_argument(
        "--no_decay_bias_and_norm",
        action="store_true",
        help="the JSON's weight decay leaves out biases and LayerNorms (the paper's does not)",
    )
    add("hidden_dropout_prob", float, "dropout of hidden states (default: 0.1, or as the model of --init_from had)")
    add("attention_probs_dropout_prob", float, "dropout of attention weights (default: the same)")
    add("rendezvous_timeout", float, "seconds for which processes wait for each other at the start")
    add("torch_compile", str, "compile the encoder; auto: on a GPU, at ZeRO stages 0 to 2", choices=TORCH_COMPILE)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    arguments = vars(parser.parse_args(words))
    del arguments["local_rank"]
    return PretrainOptions(**arguments)


if __name__ == "__main__":
    options = parse_arguments()
    run_command(lambda: pretrain(options), leave)
