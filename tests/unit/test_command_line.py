"""How commands read their arguments and end."""

import errno
import io
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ds_roberta.command_line import (
    ArgumentParser,
    positive,
    positive_number,
    probability,
    run_command,
    several,
)
from ds_roberta.errors import DiskError, LocalError, UserError
from ds_roberta.finetuning import finetune as finetune_module
from ds_roberta.finetuning.finetune import SWEEP, FinetuneConfig
from ds_roberta.finetuning.one_run import Setting, for_width
from ds_roberta.progress import progress_bar


def run(command):
    with pytest.raises(SystemExit) as caught:
        run_command(command)
    return caught.value.code


def fail_with(error):
    def command():
        raise error

    return command


def test_an_argument_that_is_not_utf_8_is_an_error_and_printing_it_is_none(capsys):
    parser = ArgumentParser(prog="command")
    parser.add_argument("--output")
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--output", os.fsdecode(b"caf\xe9")])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(r"error: the argument 'caf\udce9' is not UTF-8: write it in UTF-8")
    assert parser.parse_args(["--output", "café"]).output == "café"
    assert run(lambda: print(os.fsdecode(b"caf\xe9"))) == 0
    assert capsys.readouterr().out == "caf\\udce9\n"


def test_a_reader_that_has_left_is_known_without_a_buffer_too(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with io.TextIOWrapper(open(write, "wb", buffering=0), write_through=True) as unbuffered:
        monkeypatch.setattr("sys.stdout", unbuffered)
        code = run(lambda: print("text"))
        monkeypatch.undo()
    assert code == 141


def test_a_commands_own_code_is_its_exit_code():
    assert run(lambda: None) == 0
    assert run(lambda: 0) == 0
    assert run(lambda: 85) == 85


def test_a_user_error_is_one_line_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert run(fail_with(UserError("the file 'x'\n  is missing: make it"))) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: the file 'x' is missing: make it\n"
    assert captured.out == ""


def test_several_things_that_are_wrong_have_a_line_each(capsys):
    assert run(fail_with(UserError("x.json has 2 problems:", "the one:\n fix it", "the other"))) == 2
    assert capsys.readouterr().err == "error: x.json has 2 problems:\n  the one: fix it\n  the other\n"


def test_the_first_process_of_a_host_alone_reports(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run(fail_with(UserError("wrong"))) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert run(fail_with(UserError("wrong"))) == 2
    assert capsys.readouterr().err == "error: wrong\n"


def test_what_only_one_process_meets_it_reports_itself(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run(fail_with(OSError(errno.EROFS, "", "/data/a"))) == 2
    assert capsys.readouterr().err == (
        "error: a file or standard output was refused (Read-only file system: /data/a): fix this, then run the same "
        "command again\n"
    )
    for error in (DiskError("cannot write 'a'"), LocalError("cannot read 'a'")):
        assert run(fail_with(error)) == 2
        assert capsys.readouterr().err == f"error: {error}\n"


def test_output_that_is_refused_is_one_line_and_exit_code_2(capsys, monkeypatch):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert run(lambda: print("lost")) == 2
    assert capsys.readouterr().err.startswith(
        "error: a file or standard output was refused (No space left on device): "
    )


def test_a_broken_pipe_of_another_kind_is_not_hidden():
    with pytest.raises(BrokenPipeError):
        run_command(fail_with(BrokenPipeError()))


def test_a_reader_that_has_seen_enough_is_no_error(capsys, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert run(lambda: print("unread")) == 141
    assert capsys.readouterr().err == ""


def test_messages_that_are_refused_are_lost(monkeypatch):
    """For example with a log on a full disk: neither a bar nor an error's message changes how a command ends."""

    def command():
        bar = progress_bar(total=2)
        bar.update(1)
        bar.write("a line", file=bar.fp)
        bar.close()
        raise UserError("wrong")

    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stderr", full)
        assert run(command) == 2


def test_an_interruption_is_no_traceback(capsys):
    assert run(fail_with(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_interruption_of_the_imports_is_no_traceback():
    program = "import ds_roberta.command_line, os, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "os.kill(os.getpid(), signal.SIGINT)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "interrupted\n")


def test_a_defect_of_the_program_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_command(fail_with(ZeroDivisionError()))
    with pytest.raises(ValueError, match="not the user's"):
        run_command(fail_with(ValueError("not the user's")))


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (positive, "7", 7),
        (positive, "0", "'0' is not a whole number, at least 1"),
        (positive, "1.5", "'1.5' is not a whole number, at least 1"),
        (positive_number, "2e-5", 2e-5),
        (positive_number, "inf", "'inf' is not a number above 0"),
        (probability, "0", 0),
        (probability, "1.1", "'1.1' is not a number from 0 to 1"),
        (several(positive), "16,32", (16, 32)),
        (several(positive), "16,", "'' is not a whole number, at least 1"),
    ],
)
def test_a_value_that_cannot_be_is_named(kind, text, expected, capsys):
    parser = ArgumentParser(prog="train")
    parser.add_argument("--value", type=kind)
    if isinstance(expected, str):
        with pytest.raises(SystemExit):
            parser.parse_args(["--value", text])
        assert capsys.readouterr().err == f"error: argument --value: {expected}; train --help lists the options\n"
    else:
        assert parser.parse_args(["--value", text]).value == expected


def test_fine_tuning_tries_every_pair_of_the_rates_and_batches_given():
    script = runpy.run_path(str(Path(__file__).parents[2] / "launch/finetune.py"))

    def settings(*words):
        required = ("--model", "m", "--task", "regression", "--data", "d", "--output_dir", "o")
        return script["config_of"](script["parse_arguments"]([*required, *words])).settings

    assert settings("--local_rank=1") == (Setting(2e-5, 16),)  # the deepspeed launcher adds it
    assert settings("--learning_rate", "1e-4,3e-4", "--train_batch_size", "8,16") == (
        *(Setting(1e-4, 8), Setting(3e-4, 8)),
        *(Setting(1e-4, 16), Setting(3e-4, 16)),
    )
    assert settings("--sweep") == tuple(SWEEP)
    with pytest.raises(SystemExit):
        settings("--sweep", "--learning_rate", "1e-4")


def test_a_narrow_model_is_fine_tuned_at_higher_rates_unless_they_are_given(caplog):
    script = runpy.run_path(str(Path(__file__).parents[2] / "launch/finetune.py"))
    required = ("--model", "m", "--task", "regression", "--data", "d", "--output_dir", "o")
    configs = [script["config_of"](script["parse_arguments"]([*required, *words])) for words in ((), ("--sweep",))]
    given = script["config_of"](script["parse_arguments"]([*required, "--learning_rate", "2e-5"]))
    assert [config.scale_rates for config in (*configs, given)] == [True, True, False]
    for width, rate in {1024: 2e-5, 768: 2e-5, 512: 4.5e-5, 256: 1.8e-4, 128: 7.2e-4, 16: 1e-3}.items():
        assert for_width(configs[0].settings, width) == (Setting(rate, 16),)
    assert for_width(configs[1].settings, 768) == tuple(SWEEP)
    caplog.set_level("INFO", "ds_roberta")
    assert [setting.learning_rate for setting in for_width(SWEEP[:3], 128)] == [3.6e-4, 7.2e-4, 1.1e-3]
    assert "learning rate 0.00036, 0.00072, 0.0011: the model's width is 128 (for 768 or more: 1e-05" in caplog.text


@pytest.mark.parametrize(("scale_rates", "rate"), [(True, 7.2e-4), (False, 2e-5)])
def test_a_fine_tuning_has_the_rates_of_its_models_width(monkeypatch, tmp_path, scale_rates, rate):
    def problem(config, *_):
        raise UserError(f"the settings are {config.settings}")

    folder = SimpleNamespace(sequence_length=lambda *_: 128, config=SimpleNamespace(hidden_size=128))
    monkeypatch.setattr(finetune_module, "open_folder", lambda _: folder)
    monkeypatch.setattr(finetune_module, "_problem", problem)
    config = FinetuneConfig(tmp_path, "regression", ("d",), tmp_path / "tuned", scale_rates=scale_rates)
    with pytest.raises(UserError, match=re.escape(str((Setting(rate, 16),)))):
        finetune_module.finetune(config)
