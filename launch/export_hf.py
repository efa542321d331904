"""Export a checkpoint to a transformers folder: `python launch/export_hf.py --checkpoint DIR --output DIR`."""

from pathlib import Path

from ds_roberta.command_line import ArgumentParser, run_command
from ds_roberta.process import set_up_logging
from ds_roberta.training.export import export_checkpoint


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="export_hf.py", description="Export a checkpoint to a Hugging Face transformers folder."
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a run's folder (its newest good checkpoint), or one checkpoint"
    )
    parser.add_argument(
        "--best", action="store_true", help="for a run's folder, export the checkpoint with the lowest held-out loss"
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    return parser


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    set_up_logging()
    run_command(lambda: export_checkpoint(arguments.checkpoint, arguments.output, arguments.best))
