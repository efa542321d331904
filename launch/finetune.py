"""Fine-tune a transformers folder: `python launch/finetune.py --model DIR --task T --data DIR --output_dir DIR`."""

import argparse
from collections.abc import Sequence

from ds_roberta.command_line import ArgumentParser, positive, positive_number, run_command, several, whole_number
from ds_roberta.finetuning import TASKS
from ds_roberta.finetuning.finetune import SWEEP, FinetuneConfig, finetune
from ds_roberta.finetuning.one_run import Setting
from ds_roberta.options import add_options, options_of
from ds_roberta.process import leave, set_up_logging


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="finetune.py", description="Fine-tune an exported transformers folder on labelled texts."
    )
    add_options(parser, FinetuneConfig)
    runs = parser.add_argument_group("Runs; the best is kept")
    runs.add_argument(
        "--seeds", type=several(whole_number), default=(0,), help="seeds of the runs, such as 0,1,2; default: 0"
    )
    runs.add_argument(
        "--sweep", action="store_true",
        help="try batches of 16 and 32 at rates of 1e-5, 2e-5 and 3e-5, higher if the model is narrower than base",
    )  # fmt: skip
    runs.add_argument(
        "--learning_rate", type=several(positive_number),
        help="the peak after the warm-up, or several to choose from, such as 1e-4,3e-4; default: 2e-5, higher if the "
        "model is narrower than base (tiny: 1.8e-4, nano: 7.2e-4)",
    )  # fmt: skip
    runs.add_argument("--train_batch_size", type=several(positive), help="examples per step, or several; default: 16")
    add_options(parser, *(task.options_class for task in TASKS.values()))
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    arguments = parser.parse_args(words)
    if arguments.sweep and (arguments.learning_rate or arguments.train_batch_size):
        parser.error("--sweep has its own batches and rates: leave out --learning_rate and --train_batch_size")
    own = {each.name for each in options_of(TASKS[arguments.task].options_class)}
    for each in (each for task in TASKS.values() for each in options_of(task.options_class)):
        if each.name not in own and getattr(arguments, each.name) != each.default:
            parser.error(f"--{each.name} does nothing with --task {arguments.task}: leave it out")
    return arguments


def config_of(arguments: argparse.Namespace) -> FinetuneConfig:
    rates, sizes = arguments.learning_rate or (2e-5,), arguments.train_batch_size or (16,)
    return FinetuneConfig.from_options(
        vars(arguments),
        data=tuple(arguments.data),
        settings=tuple(SWEEP) if arguments.sweep else tuple(Setting(rate, size) for size in sizes for rate in rates),
        scale_rates=not arguments.learning_rate,
        seeds=arguments.seeds,
        task_options=TASKS[arguments.task].options_class.from_options(vars(arguments)),
    )


if __name__ == "__main__":
    arguments = parse_arguments()
    set_up_logging()
    run_command(lambda: finetune(config_of(arguments)), leave)
