"""Predict with a fine-tuned model: `python launch/predict.py --model DIR --input FILE`, or `--text TEXT`."""

import argparse
from pathlib import Path

from ds_roberta.command_line import ArgumentParser, positive, probability, run_command
from ds_roberta.finetuning.labelled_tables import Columns
from ds_roberta.finetuning.predict import PredictConfig, predict
from ds_roberta.finetuning.prediction_files import BOARDS
from ds_roberta.inputs.tables import TABULAR_NAMES
from ds_roberta.options import add_options
from ds_roberta.process import set_up_logging

TASK_OPTIONS = ("text_column", "text_pair_column", "no_answer_threshold", "label_threshold")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="predict.py", description="Labels, numbers, entities or answers from a fine-tuned transformers folder."
    )
    parser.add_argument("--model", type=Path, required=True, help="the folder that launch/finetune.py wrote")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "--input",
        help=f"a table ({TABULAR_NAMES}); for token classification also columns of CoNLL or CoNLL-U, for question "
        "answering also SQuAD's .json",
    )  # fmt: skip
    asked.add_argument("--text", help="one text instead of a file")
    asked.add_argument("--question", help="one question instead of a file, about --context")
    parser.add_argument("--text_pair", help="the second of a pair of texts, with --text")
    parser.add_argument("--context", help="the text that answers --question")
    parser.add_argument(
        "--output", type=Path,
        help="also write the answers to this file, after the other columns of the input: .jsonl, .csv, or .tsv for "
        "--glue_task",
    )  # fmt: skip
    parser.add_argument("--glue_task", choices=BOARDS, help="write --output for this task of GLUE's board")
    add_options(parser, Columns, only=("text_column", "text_pair_column"))
    parser.add_argument("--max_seq_length", type=positive, help="in tokens; default: as in fine-tuning")
    parser.add_argument("--batch_size", type=positive, default=32, help="texts per forward pass (default: %(default)s)")
    parser.add_argument(
        "--no_answer_threshold", type=probability,
        help="give no answer if its probability is above this; default: as in fine-tuning",
    )  # fmt: skip
    parser.add_argument(
        "--label_threshold", type=probability,
        help="of several labels, those with a higher probability apply; default: as in fine-tuning",
    )  # fmt: skip
    return parser


def config_of(arguments: argparse.Namespace) -> PredictConfig:
    options = {name: vars(arguments)[name] for name in TASK_OPTIONS}
    return PredictConfig(
        model=arguments.model,
        input=arguments.input,
        text=arguments.text,
        text_pair=arguments.text_pair,
        question=arguments.question,
        context=arguments.context,
        output=arguments.output,
        glue_task=arguments.glue_task,
        task_options={name: value for name, value in options.items() if value is not None},
        max_seq_length=arguments.max_seq_length,
        batch_size=arguments.batch_size,
    )


def main(config: PredictConfig) -> None:
    predict(config)


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    set_up_logging()
    run_command(lambda: main(config_of(arguments)))
