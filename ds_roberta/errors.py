"""Errors that a user can mend, and how a command reports them."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

USER_ERROR_EXIT_CODE = 2


class UserError(ValueError):
    """Something outside the program is wrong: the message names it, its value and the remedy, in one line."""


def unknown_key_message(kind: str, key: str, known: Iterable[str]) -> str:
    """One line naming an unknown `key` and the nearest known one."""
    nearest = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {kind} {key!r}{hint}"


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with its errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR_EXIT_CODE, f"error: {message}; {self.prog} --help lists the options\n")


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
