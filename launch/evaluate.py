"""Evaluate a transformers folder without training it: `python launch/evaluate.py minimal-pairs --model DIR --data
FILES`."""

import argparse
from pathlib import Path

from ds_roberta.command_line import ArgumentParser, run_command
from ds_roberta.config import MaskingConfig
from ds_roberta.evaluation.minimal_pairs import PairOptions, evaluate_minimal_pairs
from ds_roberta.evaluation.perplexity import evaluate_perplexity
from ds_roberta.evaluation.pseudo_likelihood import METRICS
from ds_roberta.evaluation.roberta_folder import PRECISIONS
from ds_roberta.options import add_options
from ds_roberta.process import set_up_logging
from ds_roberta.training.settings import RunConfig

MASKING = ("masking", "mlm_probability", "mask_replace_prob", "random_replace_prob")
"""Options of held-out masks: whatever changes during training, or with the epoch, means nothing here."""


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="evaluate.py",
        description="Evaluate a local RoBERTa folder, exported or downloaded, without training it.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    pairs = commands.add_parser("minimal-pairs", help="is each pair's acceptable sentence the more likely (BLiMP)")
    add_common(pairs)
    pairs.add_argument("--data", nargs="+", required=True, help="tables such as BLiMP's .jsonl, or folders of them")
    pairs.add_argument(
        "--metric",
        choices=METRICS,
        default=METRICS[0],
        help="what is masked along with each token: nothing, or the later tokens of its word (default: %(default)s)",
    )
    add_options(pairs, PairOptions)

    perplexity = commands.add_parser("perplexity", help="held-out masked-LM loss on a data folder")
    add_common(perplexity)
    perplexity.add_argument("--data", type=Path, required=True, help="folder made by 'preprocess shard'")
    perplexity.add_argument("--max_seq_length", type=int, help="tokens per sequence (default: the model folder's)")
    add_options(perplexity, RunConfig, only=(*MASKING, "packing", "eval_sequences"))
    return parser


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="a transformers folder with its tokenizer")
    parser.add_argument(
        "--precision", choices=list(PRECISIONS), default="fp32", help="precision of the weights (default: fp32)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")


def evaluate(arguments: argparse.Namespace) -> None:
    if arguments.command == "minimal-pairs":
        evaluate_minimal_pairs(
            arguments.model,
            arguments.data,
            arguments.metric,
            arguments.precision,
            arguments.json,
            PairOptions.from_options(vars(arguments)),
        )
        return
    evaluate_perplexity(
        arguments.model,
        arguments.data,
        arguments.max_seq_length,
        arguments.packing,
        MaskingConfig(
            arguments.mlm_probability,
            arguments.mask_replace_prob,
            arguments.random_replace_prob,
            unit=arguments.masking,
        ),
        arguments.eval_sequences,
        arguments.precision,
        arguments.json,
    )


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    set_up_logging()
    run_command(lambda: evaluate(arguments))
