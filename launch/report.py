"""Show runs side by side on one HTML page: `python launch/report.py runs/A runs/B --output report.html`."""

from pathlib import Path

from ds_roberta.command_line import ArgumentParser, run_command
from ds_roberta.process import set_up_logging
from ds_roberta.report.page import write_report


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="report.py", description="Show runs side by side on one HTML page, which needs no network."
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run or of a fine-tuned model"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        help="the page to write (default: report.html); its plots are PNGs beside it, in STEM_plots",
    )
    return parser


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    set_up_logging()
    run_command(lambda: write_report(arguments.runs, arguments.output))
