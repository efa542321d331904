"""What every command shares: how its arguments are read and how it ends."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from ds_roberta.errors import UserError

USER_ERROR_EXIT_CODE = 2
Value = TypeVar("Value")


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with its errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR_EXIT_CODE, f"error: {message}; {self.prog} --help lists the options\n")


def whole_number(text: str) -> int:
    """From 0 up; as argparse's `type`, like the following."""
    return _number(text, int, "a whole number", lambda number: number >= 0)


def positive(text: str) -> int:
    return _number(text, int, "a whole number from 1 up", lambda number: number >= 1)


def positive_number(text: str) -> float:
    return _number(text, float, "a number above 0", lambda number: 0 < number < math.inf)


def probability(text: str) -> float:
    return _number(text, float, "between 0 and 1", lambda number: 0 <= number <= 1)


def several(kind: Callable[[str], Value]) -> Callable[[str], tuple[Value, ...]]:
    """The type of values of one kind with commas between them."""
    return lambda text: tuple(kind(part) for part in text.split(","))


def _number(text: str, kind: Callable[[str], Value], description: str, is_allowed: Callable[[Value], bool]) -> Value:
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not is_allowed(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not {description}")
    return number


def run_command(command: Callable[[], int | None], leave: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Run a command's body and `leave`: with its own code, or with 2 and one line on stderr for a `UserError`.

    Under a launcher every process meets the same error; the first of each host reports it.
    """
    try:
        code = command() or 0
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        code = USER_ERROR_EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    leave(code)
