"""What the README and the quickstart tell people to type is accepted by the commands."""

import re
import runpy
import shlex
import sys

import pytest
from commands import REPOSITORY, run

QUICKSTART = runpy.run_path(str(REPOSITORY / "examples/quickstart.py"))["COMMANDS"]


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("command", [*QUICKSTART, *readme_commands()])
def test_documented_commands_are_accepted(command, monkeypatch, capsys):
    words = shlex.split(command)
    if words[0] == "mpirun":
        words = words[words.index("preprocess") :]
    elif "--wrap" in words:
        words = shlex.split(words[words.index("--wrap") + 1])
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "preprocess":
        from preprocessing.cli import parser

        parser().parse_args(words[1:])
    elif any(word.startswith("launch/") for word in words):
        script = next(word for word in words if word.startswith("launch/"))
        arguments = words[words.index(script) + 1 :]
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        names = runpy.run_path(str(REPOSITORY / script))
        parse = names.get("parse_arguments") or names["make_parser"]().parse_args
        parse()
    else:
        assert words[0] in ("git", "cd", "tensorboard", "sbatch"), command


def test_the_readme_shows_the_stages_commands():
    text = re.sub(r"\s*\\\n\s*", " ", (REPOSITORY / "README.md").read_text(encoding="utf-8"))
    for command in QUICKSTART:
        assert command.split()[0] in text


def test_the_examples_from_python_run_as_they_stand(tmp_path):
    for folder in ("ds_configs", "examples"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    run("env", "DS_ACCELERATOR=cpu", sys.executable, "-m", "doctest", REPOSITORY / "docs/python.md", cwd=tmp_path)
    assert (tmp_path / "notebook/run/hf").is_dir()
