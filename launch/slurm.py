"""Write a SLURM job file from a template of `launch/slurm/`, and check it.

    python launch/slurm.py pretrain_multi_node --nodes 4 --gpus_per_node 8 --time 24:00:00 -- \
        --deepspeed_config ds_configs/zero1.json --data_dir data/corpus --output_dir runs/base

What follows `--` is passed to the template's command unchanged, if that command's parser accepts it.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from ds_roberta.command_line import ArgumentParser, run_command
from ds_roberta.errors import UserError, unknown_key_message
from ds_roberta.files import created_parents, errors_of_the_disk, write_text

REPOSITORY = Path(__file__).resolve().parents[1]
TEMPLATES = {path.stem: path for path in sorted((REPOSITORY / "launch/slurm").glob("*.sbatch"))}
COUNTS = ("gpus_per_node", "processes_per_node", "cpus_per_task", "signal_seconds", "tasks")
SIGNAL_SECONDS = 120
PRETRAIN_PARSER = "from launch.pretrain import parse_arguments as parse"
# Code that defines parse(words) for the options after --. It runs in another process, as the import may be slow.
PARSERS = {
    "finetune": "from launch.finetune import parse_arguments as parse",
    "preprocess": "from preprocessing.cli import parser; parse = lambda words: parser().parse_args(['shard', *words])",
    "pretrain_multi_node": PRETRAIN_PARSER,
    "pretrain_single_node": PRETRAIN_PARSER,
}
_PLACEHOLDER = re.compile(r"@([a-z_]+)@")
_TIME = re.compile(r"(\d+-)?\d+(:\d{1,2}){0,2}|infinite", re.IGNORECASE)  # sbatch's forms: minutes, D-HH, HH:MM:SS, …
_NO_CLUSTER = ("Could not establish a configuration source", "Unable to contact slurm controller")  # sbatch's words
_PLAIN = re.compile(r"[A-Za-z0-9_./:+-]+")  # what needs no quotes in bash or after #SBATCH


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="slurm.py",
        description="Write a SLURM job file from a template and check it.",
        epilog="What follows -- is passed to launch/pretrain.py, launch/finetune.py or preprocess shard.",
        allow_abbrev=False,
    )
    parser.add_argument("template", help=", ".join(TEMPLATES))
    parser.add_argument("--output", type=Path, help="the job file to write (default: JOB_NAME.sbatch)")
    parser.add_argument("--job_name", help="name of the job (default: the template's)")
    parser.add_argument("--time", help="limit of one start, such as 24:00:00 or 2-00:00:00; a run may need several")
    parser.add_argument("--partition", help="partition to run in (default: the site's)")
    parser.add_argument("--account", help="account to charge (default: yours)")
    parser.add_argument("--nodes", help="number of nodes, or MIN-MAX to start on what is free")
    parser.add_argument("--gpus_per_node", type=int, help="GPUs of each node; 0 trains on CPUs")
    parser.add_argument(
        "--processes_per_node", type=int, help="processes on each node (default: one for each GPU; 1 on CPUs)"
    )
    parser.add_argument("--tasks", type=int, help="number of tasks in the array")
    parser.add_argument("--cpus_per_task", type=int, help="CPU cores of each process (default: 8; preprocess: 16)")
    parser.add_argument("--mem", help="memory of a node, such as 64G (default: the site's)")
    parser.add_argument(
        "--signal_seconds",
        type=int,
        help=f"seconds before the limit at which to stop and save (default: {SIGNAL_SECONDS})",
    )
    parser.add_argument(
        "--log_dir", type=Path, default=Path("logs"), help="folder of the job's logs (default: %(default)s)"
    )
    parser.add_argument("--setup", default="", help="bash command to run before the job's, such as 'module load cuda'")
    return parser


def parse_arguments() -> argparse.Namespace:
    own, command = split_command(sys.argv[1:])
    arguments = make_parser().parse_args(own)
    arguments.arguments = command
    return arguments


def split_command(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the words before and after the first `--`."""
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


def job_values(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the value of each placeholder that has one.

    Raises:
        UserError: a value is out of range, or cannot be written into a job file.
    """
    given = vars(arguments)
    for name in COUNTS:
        smallest = 0 if name == "gpus_per_node" else 1
        if given[name] is not None and given[name] < smallest:
            raise UserError(f"--{name} {given[name]} is less than {smallest}: give more")
    if arguments.time is not None and not _TIME.fullmatch(arguments.time):
        raise UserError(f"--time {arguments.time!r} is not a time limit: give minutes, HH:MM:SS or D-HH:MM:SS")
    if arguments.nodes is not None:
        borders = re.fullmatch(r"(\d+)(?:-(\d+))?", arguments.nodes)
        if not borders or int(borders[1]) < 1 or int(borders[2] or borders[1]) < int(borders[1]):
            raise UserError(f"--nodes {arguments.nodes!r} is not a number of nodes: give one, or MIN-MAX such as 2-4")
    processes = arguments.processes_per_node or arguments.gpus_per_node or 1
    if arguments.gpus_per_node and processes > arguments.gpus_per_node:
        raise UserError(
            f"--processes_per_node {processes} is more than --gpus_per_node {arguments.gpus_per_node}: each process "
            "needs a GPU"
        )
    signal_seconds = SIGNAL_SECONDS if arguments.signal_seconds is None else arguments.signal_seconds
    limit = arguments.time and seconds_of(arguments.time)
    if arguments.template != "preprocess" and limit and limit <= signal_seconds:
        raise UserError(
            f"--time {arguments.time} is {limit} seconds, and the job would be asked to stop {signal_seconds} seconds "
            "before: give more time, or fewer --signal_seconds"
        )
    cpus = arguments.cpus_per_task or (16 if arguments.template == "preprocess" else 8)
    values: dict[str, str | int | Path | None] = {
        **{name: given[name] for name in ("time", "partition", "account", "nodes", "mem")},
        "signal_seconds": signal_seconds,
        "job_name": arguments.job_name or arguments.template,
        "gpus_per_node": arguments.gpus_per_node or None,
        "processes_per_node": processes,
        "cpus_per_task": cpus,
        "cpus_per_node": processes * cpus,
        "array": f"0-{arguments.tasks - 1}" if arguments.tasks else None,
        "working_dir": Path.cwd(),
        "log_dir": arguments.log_dir.resolve(),
        "path": Path(sys.executable).parent,
        "repository": REPOSITORY,
    }
    for name, value in values.items():
        if value is not None and not _PLAIN.fullmatch(str(value)):
            raise UserError(
                f"{name} {str(value)!r} has characters that a job file cannot contain: use letters and digits"
            )
    plain = {name: str(value) for name, value in values.items() if value is not None}
    return {**plain, "setup": arguments.setup, "arguments": shlex.join(arguments.arguments)}


def seconds_of(time: str) -> int | None:
    """The seconds of a time limit in one of sbatch's forms; None if there is no limit."""
    if time.lower() == "infinite":
        return None
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    # D-HH[:MM[:SS]]; MM, MM:SS or HH:MM:SS
    hours, minutes, seconds = [*parts, 0, 0][:3] if dash or len(parts) == 3 else [0, *parts, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def fill(template: str, values: dict[str, str]) -> str:
    """Return the template with its values; a line whose `OPTIONAL` value is missing is left out."""
    lines = []
    for line in template.splitlines():
        names = _PLACEHOLDER.findall(line)
        if line == "@setup@" and not values["setup"]:
            continue
        if any(name in OPTIONAL and name not in values for name in names):
            continue
        lines.append(_PLACEHOLDER.sub(lambda match: values[match[1]], line))
    return "\n".join(lines) + "\n"


OPTIONAL = ("partition", "account", "gpus_per_node", "mem")
OPTION_OF = {"array": "tasks"}  # placeholders made from an option with another name


def job_file(arguments: argparse.Namespace) -> str:
    """Return the job file's text.

    Raises:
        UserError: the template is unknown, or a value is missing, out of range or not used by the template.
    """
    if arguments.template not in TEMPLATES:
        message = unknown_key_message("template", arguments.template, TEMPLATES)
        raise UserError(f"{message}; there are {', '.join(TEMPLATES)}")
    template = TEMPLATES[arguments.template].read_text(encoding="utf-8")
    names = {OPTION_OF.get(name, name): name for name in _PLACEHOLDER.findall(template)}
    values = job_values(arguments)
    for option in ("nodes", "gpus_per_node", "processes_per_node", "tasks", "mem", "signal_seconds"):
        if getattr(arguments, option) is not None and option not in names:
            raise UserError(
                f"--{option} {getattr(arguments, option)}: {arguments.template} does not use it; leave it out"
            )
    unset = [f"--{option}" for option, name in names.items() if name not in values and name not in OPTIONAL]
    if "gpus_per_node" in names and arguments.gpus_per_node is None:
        unset.append("--gpus_per_node (0 for CPUs)")
    if not arguments.arguments:
        unset.append("the command's options after --")
    if unset:
        raise UserError(f"{arguments.template} needs {', '.join(unset)}")
    return fill(template, values)


def check_command(template: str, words: list[str]) -> None:
    """Have the parser of the template's command check the options after `--` now, rather than when the job starts.

    Raises:
        UserError: the parser refuses them, or would only show its help.
    """
    if asked := {"-h", "--help"}.intersection(words):
        raise UserError(f"after --: {min(asked)} would only show the help when the job starts: remove it")
    program = f"import sys; {PARSERS[template]}; parse(sys.argv[1:])"
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}  # the job runs in this folder, too
    result = subprocess.run([sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"after --: {result.stderr.strip().splitlines()[-1].removeprefix('error: ')}")


def check(path: Path) -> None:
    """Have bash check the file, and sbatch too if it is installed.

    Raises:
        UserError: one of them refuses it.
    """
    commands = [["bash", "-n", str(path)]]
    if shutil.which("sbatch"):
        commands.append(["sbatch", "--test-only", str(path)])
    else:
        print("there is no sbatch here: the file was not tested against a cluster")
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            words = " ".join(result.stderr.split())
            if any(sign in words for sign in _NO_CLUSTER):
                print(f"not tested against a cluster: {words}")
                continue
            raise UserError(f"{' '.join(command)} refuses the file: {words}; fix the values and write it again")
        if command[0] == "sbatch":
            print(result.stderr.strip())


def main(arguments: argparse.Namespace) -> None:
    text = job_file(arguments)
    check_command(arguments.template, arguments.arguments)
    output = arguments.output or Path(f"{arguments.job_name or arguments.template}.sbatch")
    with errors_of_the_disk(output), created_parents(arguments.log_dir / "of-the-job"):
        arguments.log_dir.mkdir(parents=True, exist_ok=True)  # sbatch would lose the job's output without it
        write_text(output, text)
    print(f"wrote {output}")
    check(output)
    print(f"next: sbatch {shlex.quote(str(output))}; squeue --me; the logs go to {arguments.log_dir}/")


if __name__ == "__main__":
    options = parse_arguments()
    run_command(lambda: main(options))
