"""Pretrain a RoBERTa encoder: `deepspeed launch/pretrain.py --deepspeed_config ds_configs/zero2.json`.

Works under the deepspeed launcher, torchrun, srun and mpirun, or as a single process.
"""

import argparse
import os
from collections.abc import Sequence

# Waiting threads that spin slow each other down on busy cores. torch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from ds_roberta.command_line import ArgumentParser, run_command
from ds_roberta.options import add_options
from ds_roberta.process import leave
from ds_roberta.training.recipes import OPTIONS_OF_RECIPES
from ds_roberta.training.run import pretrain
from ds_roberta.training.settings import RunConfig, StartOptions


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="pretrain.py", description="Pretrain a RoBERTa encoder with DeepSpeed.", allow_abbrev=False
    )
    add_options(parser, StartOptions)
    add_options(parser, RunConfig)
    parser.set_defaults(**dict.fromkeys(OPTIONS_OF_RECIPES))  # unless one is given, the recipe decides
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    options = make_parser().parse_args(words)
    del options.local_rank
    return options


if __name__ == "__main__":
    options = parse_arguments()
    run_command(lambda: pretrain(options), leave)
