"""How the tests are run: on all cores, those that mostly wait first. `shared_fixtures.py` has the fixtures of all."""

import gc
import os
from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Lets pytest-xdist, if it is installed, run whole folders on all cores, each file in one process.

    Not where `-n` says otherwise, with `--pdb`, or on a GPU, whose memory tests measure and fill.
    """
    options = config.option
    is_unset = getattr(options, "numprocesses", 0) is None and not hasattr(config, "workerinput")
    are_folders = all(Path(argument).is_dir() for argument in config.args)
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))  # torch would tell after seconds
    if is_unset and are_folders and not options.usepdb and not has_gpu:
        options.numprocesses, options.dist = min(os.cpu_count() or 1, 8), "loadfile"
        options.loadscopereorder = False  # tests/distributed, where a file takes minutes, comes first


def pytest_configure(config):
    """Spares the process that only hands out the tests their imports, for which all others would wait."""
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_collection_modifyitems(items):
    """Begins with the tests that mostly wait, for SLURM, so that they do so while others compute."""
    items.sort(key=lambda item: "slurm" not in item.keywords)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Spares the tests' imports the garbage collector, which finds nothing in them but makes them take half as long
    again; and the collector the modules, which Trainer has it walk through at every start.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
