"""benchmarks/gpu.sh on a machine without a GPU: its limits, and what it leaves when parts fail."""

import os
import re
import subprocess
import tarfile

import pytest

from benchmarks.environment import REPOSITORY

SCRIPT = REPOSITORY / "benchmarks/gpu.sh"
GROUPS = ("speed", "contracts", "peers")


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_takes_less_than_nine_minutes(group):
    parts = re.search(rf"^{group}\)\n(.*?)^  ;;", SCRIPT.read_text(), re.DOTALL | re.MULTILINE)[1]
    limits = [int(limit) for limit in re.findall(r"^  part \w+ (\d+) ", parts, re.MULTILINE)]
    assert len(limits) == parts.count("  part ")
    assert sum(limits) < 540


def run(tmp_path, *arguments):
    (tmp_path / "python").write_text('#!/bin/sh\necho had "$@"\nexit 3\n')
    (tmp_path / "python").chmod(0o755)
    environment = {**os.environ, "PYTHON": str(tmp_path / "python")}
    return subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True)


def test_parts_that_fail_are_named_and_kept(tmp_path):
    result = run(tmp_path, "peers", str(tmp_path / "output"))
    assert result.returncode == 1
    assert "FAILED: corpus throughput_base throughput_large" in result.stdout
    assert "== throughput_base: FAILED (3)" in (tmp_path / "output/peers.log").read_text()
    with tarfile.open(tmp_path / "output/peers.tgz") as kept:
        names = {name.rpartition("/")[2] for name in kept.getnames()}
    assert {"corpus.log", "throughput_base.log", "throughput_large.log"} <= names


def test_another_group_is_refused(tmp_path):
    result = run(tmp_path, "all", str(tmp_path / "output"))
    assert (result.returncode, result.stdout) == (2, "no group all: give speed, contracts or peers\n")


def test_shellcheck_has_nothing_to_say(shellcheck):
    for script in (SCRIPT, REPOSITORY / ".ci/run"):
        subprocess.run([shellcheck, script], check=True)
