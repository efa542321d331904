"""Argument parsing and exit codes, shared by all commands."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from types import TracebackType
from typing import Any, NoReturn, TextIO, TypeVar

from ds_roberta.errors import LocalError, UserError, standard_output_is_refused, user_message

USER_ERROR_EXIT_CODE = 2
PIPE_CLOSED_EXIT_CODE = 141
Value = TypeVar("Value")


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with one-line errors. Arguments must be UTF-8, since the libraries cannot open other paths."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments = sys.argv[1:] if args is None else list(args)
        for kind, text in (("working folder", os.getcwd()), *(("argument", argument) for argument in arguments)):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                self.error(
                    f"the {kind} {text!r} is not UTF-8: write it in UTF-8, rename the file or folder, or set "
                    "PYTHONUTF8=1 if it is, but the locale is not"
                )
        return super().parse_known_args(arguments, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR_EXIT_CODE, f"error: {message}; {self.prog} --help lists the options\n")


def whole_number(text: str) -> int:
    """Parse an integer that is at least 0; a `type` for argparse, like the functions below."""
    return _number(text, int, "a whole number", lambda number: number >= 0)


def positive(text: str) -> int:
    return _number(text, int, "a whole number, at least 1", lambda number: number >= 1)


def positive_number(text: str) -> float:
    return _number(text, float, "a number above 0", lambda number: 0 < number < math.inf)


def probability(text: str) -> float:
    return _number(text, float, "a number from 0 to 1", lambda number: 0 <= number <= 1)


def several(kind: Callable[[str], Value]) -> Callable[[str], tuple[Value, ...]]:
    """Make an argparse `type` for comma-separated values, each of them parsed by `kind`."""
    return lambda text: tuple(kind(part) for part in text.split(","))


def _number(text: str, kind: Callable[[str], Value], description: str, is_allowed: Callable[[Value], bool]) -> Value:
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not is_allowed(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not {description}")
    return number


def _report_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Say "interrupted" where Ctrl-C ends a command whose imports, which take seconds, are not done."""
    if issubclass(kind, KeyboardInterrupt):
        _say("interrupted")
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _report_uncaught


def run_command(command: Callable[[], int | None], leave: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Run a command's body, then `leave` with an exit code.

    The exit code is the command's own; or 2, after one line on stderr (or a line for each of several problems), for a
    `UserError` or a write that the disk or standard output refused; or 141, as in a shell, if the reader of our output,
    such as `head`, has closed it. Under a launcher, every process meets the same error and the first on each host
    reports it; a process that could not read or write a file of its own reports that itself.
    """
    # A file's name may not be UTF-8, and a terminal may not have every character.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = command() or 0
        sys.stdout.flush()
    except BrokenPipeError:
        if not standard_output_is_refused():
            raise
        code = PIPE_CLOSED_EXIT_CODE
    except KeyboardInterrupt:
        _say("interrupted")
        code = 130
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        is_shared = isinstance(error, UserError) and not isinstance(error, LocalError)
        if not is_shared or os.environ.get("LOCAL_RANK", "0") == "0":
            _say("error: " + "\n  ".join(" ".join(line.split()) for line in message))
        code = USER_ERROR_EXIT_CODE
    for stream in (sys.stdout, sys.stderr):
        _drop_what_is_refused(stream)
    leave(code)


def _say(line: str) -> None:
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _drop_what_is_refused(stream: TextIO) -> None:
    """Discard what a stream refuses: Python would flush it again at exit and report the failure in its own words."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
