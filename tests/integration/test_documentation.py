"""The commands accept what the documents and the quickstart tell people to type, and every link has a target."""

import doctest
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from commands import REPOSITORY, launch, names_of

QUICKSTART = runpy.run_path(str(REPOSITORY / "examples/quickstart.py"))["COMMANDS"]
README = REPOSITORY / "README.md"
DOCUMENTS = [README, REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PRETRAIN = "launch/pretrain.py --deepspeed_config ds_configs/zero1.json"
JOBS = {"preprocess": "preprocess shard", "finetune": "launch/finetune.py"}  # of launch/slurm.py; the others pretrain
OPTION = re.compile(r"(?<![\w-])--([A-Za-z][\w-]+)")
OTHERS = ("git", "hf", "cd", "module", ".", "sbatch", "squeue", "tail", "tensorboard", "printf")
OPTIONS_OF_OTHERS = {
    *("array", "wrap", "nodes", "ntasks-per-node", "signal", "requeue", "kill-on-bad-exit", "test-only"),  # SLURM
    *("gpus-per-node", "gpus-per-task"),
    *("num_gpus", "num_nodes", "include", "exclude", "hostfile", "master_addr", "launcher"),  # deepspeed
    *("launcher_args", "no_ssh_check"),
    *("host", "mca", "allow-run-as-root"),  # mpirun
    *("me", "logdir", "local-dir"),  # squeue, tensorboard, hf
    "model-id",  # text-embeddings-router
    "utilisation",  # benchmarks.plan, which makes its options from a dataclass
}


def commands(text: str) -> list[str]:
    """The lines of ```bash blocks, and the middle cells of the tables that are nothing but code."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ").splitlines()
    cells = re.findall(r"^\| [^|`]+ \| `([^`|]+)` \|", text, re.MULTILINE)
    return [*(line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")), *cells]


def documented_commands() -> list[str]:
    found = [command for document in DOCUMENTS for command in commands(document.read_text(encoding="utf-8"))]
    return list(dict.fromkeys([*QUICKSTART, *found]))


def help_of(parse, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        parse()
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_are_accepted(command, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_architecture").mkdir()
    (tmp_path / "my_architecture/config.json").write_text('{"model_type": "roberta"}')
    words = shlex.split(f"{PRETRAIN} {command}" if command.startswith("--") else command)
    if "--wrap" in words:
        words = shlex.split(words[words.index("--wrap") + 1])
    if "…" in words:  # further options
        words.remove("…")
        words += [] if "--deepspeed_config" in words else PRETRAIN.split()[1:]
    accept(words, monkeypatch, capsys)


def accept(words, monkeypatch, capsys):
    first = next((place for place, word in enumerate(words) if word == "preprocess" or word.endswith(".py")), None)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
        monkeypatch.setattr(sys, "argv", [words[2], "--help"])
        monkeypatch.delitem(sys.modules, words[2], raising=False)  # another test's import, of which runpy warns
        text = help_of(lambda: runpy.run_module(words[2], run_name="__main__"), capsys)
        assert all(word in text for word in words if word.startswith("--"))
    elif first is not None and words[first] == "preprocess":
        from preprocessing.cli import parser

        if "--help" in words:
            help_of(lambda: parser().parse_args(words[first + 1 :]), capsys)
        else:
            parser().parse_args(words[first + 1 :])
    elif first is not None:
        script = words[first]
        monkeypatch.setattr(sys, "argv", words[first:])
        names = names_of(script)
        parse = names.get("parse_arguments") or names["make_parser"]().parse_args
        if "--help" in words:
            help_of(parse, capsys)
        else:
            parse()
        if script == "launch/slurm.py" and "--" in words:
            job = JOBS.get(words[first + 1], PRETRAIN.split()[0])
            accept([*job.split(), *words[words.index("--") + 1 :]], monkeypatch, capsys)
    else:
        assert words[0] in OTHERS or words[:2] in (["pytest", "-m"], ["pip", "install"]), words


def test_options_in_the_documents_exist():
    scripts = [path for folder in ("benchmarks", "examples/use") for path in (REPOSITORY / folder).glob("*.py")]
    ours = [REPOSITORY / "docs/options.md", *scripts]
    known = {option for path in ours for option in OPTION.findall(path.read_text(encoding="utf-8"))}
    for document in DOCUMENTS:
        assert set(OPTION.findall(document.read_text(encoding="utf-8"))) <= known | OPTIONS_OF_OTHERS, document.name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(document):
    for path, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", document.read_text(encoding="utf-8")):
        target = document.parent / path if path else document
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor


def test_the_readme_shows_the_stages_commands():
    text = re.sub(r"\s*\\\n\s*", " ", README.read_text(encoding="utf-8"))
    for command in QUICKSTART:
        assert " ".join(command.split()[:2]) in text


def test_the_readme_is_short_with_its_tree_in_the_first_third():
    text = README.read_text(encoding="utf-8")
    assert len(text.encode()) <= 10_240
    assert text.index("\n```\n", text.index("## Layout")) <= len(text) / 3


def test_the_examples_from_python_run_as_they_stand(tmp_path, monkeypatch):
    for folder in ("ds_configs", "examples"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launch(Path(doctest.__file__), REPOSITORY / "docs/python.md", cwd=tmp_path)
    assert (tmp_path / "notebook/run/hf").is_dir()
