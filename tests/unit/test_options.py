"""An option is one field: the command line, its checks, config.json and docs/options.md follow from it."""

import argparse
import multiprocessing
import runpy
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ds_roberta.command_line import ArgumentParser
from ds_roberta.errors import UserError
from ds_roberta.options import Settings, add_options, must_be, option
from preprocessing.cli import parser as preprocess_parser

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs/options.md"
INTRODUCTION = """# Options of the commands

Made from the commands' parsers by `python tests/unit/test_options.py`; the same text is in each command's `--help`.
"""
SCRIPTS = ("pretrain", "finetune", "predict", "evaluate", "export_hf", "report", "slurm")


def page():
    """The text of docs/options.md."""
    parsers = {"preprocess": preprocess_parser()}
    for name in SCRIPTS:
        parsers[f"launch/{name}.py"] = runpy.run_path(str(REPOSITORY / f"launch/{name}.py"))["make_parser"]()
    return "\n".join([INTRODUCTION, *(f"## {name}\n\n{options_tables(parser)}" for name, parser in parsers.items())])


def options_tables(parser: argparse.ArgumentParser) -> str:
    """Markdown for docs/options.md: a table for each heading of a command's help, then those of its subcommands."""
    tables: dict[str | None, list[str]] = {}
    commands = []
    for group in parser._action_groups:
        for action in group._group_actions:
            if isinstance(action, argparse._SubParsersAction):
                commands += [f"### {name}\n\n{options_tables(each)}" for name, each in action.choices.items()]
            elif action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
                title = None if group.title in ("options", "positional arguments") else group.title
                tables.setdefault(title, []).append(row_of(action))
    head = "| option | meaning | one of |\n|---|---|---|\n"
    texts = [(f"**{title}**\n\n" if title else "") + head + "".join(rows) for title, rows in tables.items()]
    return "\n".join([*texts, *commands])


def row_of(action: argparse.Action) -> str:
    name = " ".join([*action.option_strings, *([str(action.metavar)] if action.metavar else [])]) or action.dest
    needed = " (required)" if action.required and action.option_strings else ""
    choices = ", ".join(f"`{choice}`" for choice in action.choices or ())
    return f"| `{name}`{needed} | {(action.help or '') % vars(action)} | {choices} |\n"


@dataclass(frozen=True)
class Heat(Settings):
    """How warm; measured at noon."""

    degrees: float = option("of the air", 20.0, check=must_be("below 100", lambda degrees: degrees < 100))
    scale: str | None = option("of the thermometer", None, choices=("celsius", "kelvin"))
    noted_by: str = "nobody"


@dataclass(frozen=True)
class Day(Settings):
    """A day."""

    number: int = option("of the year", name="day")
    is_windy: bool = option("the wind blows", False)
    heat: Heat = field(default_factory=Heat)


def parse(*words):
    parser = ArgumentParser(prog="weather")
    add_options(parser, Day)
    return vars(parser.parse_args(words))


def test_options_have_the_type_the_default_and_the_name_of_their_field():
    assert parse() == {"day": None, "is_windy": False, "degrees": 20.0, "scale": None}
    given = parse("--day", "3", "--is_windy", "--degrees", "5", "--scale", "kelvin")
    assert given == {"day": 3, "is_windy": True, "degrees": 5.0, "scale": "kelvin"}
    assert Day.from_options(given) == Day(3, True, Heat(5.0, "kelvin"))
    assert Day.from_options(given, number=7, heat=Heat()) == Day(7, True)


def test_checks_and_choices_hold_from_python_too():
    for words, heat in (
        ("--degrees must be below 100, got 100.0", {"degrees": 100.0}),
        ("--scale must be one of celsius, kelvin, got 'reaumur'", {"scale": "reaumur"}),
    ):
        with pytest.raises(UserError, match=words):
            Heat(**heat)


def test_a_group_is_a_heading_and_a_table():
    parser = ArgumentParser(prog="weather")
    add_options(parser, Day)
    assert "How warm:\n  --degrees DEGREES     of the air (default: 20.0)\n" in parser.format_help()
    assert (
        options_tables(parser)
        == """**A day**

| option | meaning | one of |
|---|---|---|
| `--day` | of the year |  |
| `--is_windy` | the wind blows |  |

**How warm**

| option | meaning | one of |
|---|---|---|
| `--degrees` | of the air (default: 20.0) |  |
| `--scale` | of the thermometer | `celsius`, `kelvin` |
"""
    )


def test_only_the_options_named_are_added():
    parser = ArgumentParser(prog="weather")
    add_options(parser, Day, only=("degrees",))
    assert vars(parser.parse_args([])) == {"degrees": 20.0}


def test_the_page_of_options_is_that_of_the_commands():
    pytest.importorskip("deepspeed")
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/options.md is old: write it by tests/unit/test_options.py"


def describe_run(program, connection):
    """Send the text of `--help`, the tables of options and a section of config.json, as the copied program has them."""
    for name in [*sys.modules]:
        if name.split(".")[0] in ("ds_roberta", "launch", "preprocessing"):
            del sys.modules[name]
    sys.path.insert(0, str(program))
    from ds_roberta.config import model_config
    from ds_roberta.data.stages import make_stages
    from ds_roberta.training.settings import RunConfig
    from launch.pretrain import make_parser

    parser = make_parser()
    options = vars(parser.parse_args(["--deepspeed_config", "a.json", "--made_up", "3"]))
    options |= {"max_seq_length": 64, "max_steps": 9, "warmup_steps": 1, "output_dir": Path("run")}
    run = RunConfig.from_options(
        options, model_name="tiny", model=model_config("tiny", 400, 64), stages=make_stages(64, 8), source_weights=None
    )
    connection.send((parser.format_help(), options_tables(parser), run.as_json()["masking"]))


def test_an_option_is_added_by_one_field_in_one_file(tmp_path):
    """In a copy of the program, the field appears in --help, config.json and the page of options."""
    pytest.importorskip("deepspeed")
    for folder in ("ds_roberta", "launch", "preprocessing"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    config = tmp_path / "ds_roberta/config.py"
    before = '    unit: str = option("what is masked as a whole"'
    source = config.read_text(encoding="utf-8")
    assert source.count(before) == 1
    config.write_text(source.replace(before, f'    made_up: int = option("a made-up thing", 7)\n{before}'))
    receiving, sending = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=describe_run, args=(tmp_path, sending))
    child.start()
    sending.close()
    help_text, tables, masking = receiving.recv()
    child.join()
    assert "--made_up MADE_UP" in help_text
    assert "| `--made_up` | a made-up thing (default: 7) |  |" in tables
    assert masking["made_up"] == 3


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
