"""Fine-tune a transformers folder: `python launch/finetune.py --model DIR --task T --data DIR --output_dir DIR`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ds_roberta.command_line import (
    ArgumentParser,
    positive,
    positive_number,
    probability,
    run_command,
    several,
    whole_number,
)
from ds_roberta.distributed import leave, set_up_logging
from ds_roberta.finetuning.examples import Columns
from ds_roberta.finetuning.finetune import SWEEP, TASKS, FinetuneConfig, finetune
from ds_roberta.finetuning.one_run import Recipe, Setting
from ds_roberta.finetuning.spans import SpanOptions


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="finetune.py", description="Fine-tune an exported transformers folder on labelled texts."
    )
    parser.add_argument("--model", type=Path, required=True, help="the transformers folder to begin from")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="DIR_or_FILE",
        help="a folder with train, validation (or dev) and perhaps test as .tsv, .jsonl or .parquet, CoNLL's columns "
        "or SQuAD's .json, or saved by datasets; or such files, also as validation=FILE",
    )  # fmt: skip
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to write")
    parser.add_argument("--text_column", help="default: sentence, text, or the first of a pair such as sentence1")
    parser.add_argument("--text_pair_column", help="default: the second of such a pair, where there is one")
    parser.add_argument("--label_column", help="default: label, or GLUE's names for it")
    parser.add_argument(
        "--max_seq_length", type=positive, help="in tokens; default: the length that the model was trained with"
    )
    parser.add_argument("--seeds", type=several(whole_number), default=(0,), help="such as 0,1,2; default: 0")
    parser.add_argument("--metric", help="which chooses; default: accuracy, pearson or f1")
    parser.add_argument("--sweep", action="store_true", help="batches of 16 and 32 by rates of 1e-5, 2e-5 and 3e-5")
    parser.add_argument(
        "--learning_rate", type=several(positive_number),
        help="the peak, behind a warm-up, or several such as 1e-4,3e-4, of which the best is chosen; default: 2e-5",
    )  # fmt: skip
    parser.add_argument("--train_batch_size", type=several(positive), help="examples per step, or several; default: 16")
    recipe = Recipe()
    parser.add_argument(
        "--num_train_epochs", type=positive, default=recipe.num_train_epochs, help="default: %(default)s"
    )
    parser.add_argument(
        "--gradient_accumulation_steps", type=positive, default=1, help="micro-batches of a batch; default: 1"
    )
    parser.add_argument("--weight_decay", type=float, default=recipe.weight_decay, help="default: %(default)s")
    parser.add_argument(
        "--warmup_ratio", type=probability, default=recipe.warmup_ratio, help="of all steps; default: %(default)s"
    )
    spans = SpanOptions()
    parser.add_argument(
        "--doc_stride", type=positive, default=spans.doc_stride,
        help="of question answering: tokens between the beginnings of a context's windows, at most half a window; "
        "default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--max_answer_length", type=positive, default=spans.max_answer_length,
        help="of question answering, in tokens; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--no_answer_threshold", type=probability, default=spans.no_answer_threshold,
        help="of question answering where contexts need not have an answer: the probability of none above which there "
        "is none; default: %(default)s",
    )  # fmt: skip
    precision = parser.add_mutually_exclusive_group()
    of_deepspeed = "the weights stay fp32; with --deepspeed_config its master copies do"
    precision.add_argument("--bf16", action="store_true", help=f"compute in bf16; {of_deepspeed}")
    precision.add_argument("--fp16", action="store_true", help=f"compute in fp16 on a GPU; {of_deepspeed}")
    parser.add_argument("--deepspeed_config", type=Path, help="train by DeepSpeed; see ds_configs/finetune.json")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    arguments = parser.parse_args(words)
    if arguments.sweep and (arguments.learning_rate or arguments.train_batch_size):
        parser.error("--sweep has its own batches and rates: leave out --learning_rate and --train_batch_size")
    return arguments


def config_of(arguments: argparse.Namespace) -> FinetuneConfig:
    rates, sizes = arguments.learning_rate or (2e-5,), arguments.train_batch_size or (16,)
    return FinetuneConfig(
        model=arguments.model,
        task=arguments.task,
        data=tuple(arguments.data),
        output_dir=arguments.output_dir,
        columns=Columns(arguments.text_column, arguments.text_pair_column, arguments.label_column),
        settings=tuple(SWEEP) if arguments.sweep else tuple(Setting(rate, size) for size in sizes for rate in rates),
        seeds=arguments.seeds,
        recipe=Recipe(
            arguments.num_train_epochs,
            arguments.gradient_accumulation_steps,
            arguments.weight_decay,
            arguments.warmup_ratio,
            arguments.bf16,
            arguments.fp16,
        ),
        metric=arguments.metric,
        max_seq_length=arguments.max_seq_length,
        spans=SpanOptions(
            arguments.doc_stride,
            arguments.max_answer_length,
            no_answer_threshold=arguments.no_answer_threshold,
        ),
        deepspeed_config=arguments.deepspeed_config,
    )


if __name__ == "__main__":
    arguments = parse_arguments()
    set_up_logging()
    run_command(lambda: finetune(config_of(arguments)), leave)
