"""Errors that a user can fix."""

from __future__ import annotations

import difflib
import errno
import io
import os
import re
import select
import shutil
import sys
from collections.abc import Iterable

_REFUSALS = {
    getattr(errno, name)
    for name in ("EACCES", "EDQUOT", "EFBIG", "EIO", "ENAMETOOLONG", "ENODEV", "ENOSPC", "EPERM", "EROFS", "ESTALE")
    if hasattr(errno, name)
}
_RUST_NUMBER = re.compile(r"\(os error (\d+)\)")
_WORDS_OF_NUMBER = re.compile(r"inline_container\.cc.*open file failed with strerror: ([^\n]+)")  # torch.save
_WORDS_WITHOUT_NUMBER = re.compile(
    r"PytorchStreamWriter|inline_container\.cc.*unexpected pos|iostream error"  # torch.save
    r"|Not enough free space to write|\d+ requested and \d+ written"  # numpy.save and tofile
)
_LIKENESS = 0.65  # below this, difflib's suggestions mislead: at 0.5, "fp32" is like "fp16"


class UserError(ValueError):
    """Something outside the program is wrong: the message names it, its value and the remedy, in one line.

    If several things are wrong at once, each further argument adds a line.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class LocalError(UserError):
    """An error that perhaps only this of a run's processes meets."""


class DiskError(LocalError):
    """The disk refused a write."""


def disk_refusal(error: BaseException) -> str | None:
    """What the disk refused, with the file if known; None if `error` is of another kind.

    Only Python itself raises an `OSError` with a number. safetensors and tokenizers raise their own types with the
    number in the text; numpy and torch give none.
    """
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        return next((str(reason) for _, _, reason in error.args[0]), None)
    if isinstance(error, OSError) and error.errno is not None:
        file = error.filename2 or error.filename  # the target, if it was a copy
        name = f": {os.fsdecode(file)}" if isinstance(file, str | bytes) else ""
        return f"{os.strerror(error.errno)}{name}" if error.errno in _REFUSALS else None
    text = str(error)
    if found := _RUST_NUMBER.search(text):
        return os.strerror(int(found[1])) if int(found[1]) in _REFUSALS else None
    if found := _WORDS_OF_NUMBER.search(text):
        return found[1] if found[1] in map(os.strerror, _REFUSALS) else None
    if isinstance(error, OSError | RuntimeError) and _WORDS_WITHOUT_NUMBER.search(text):
        return f"perhaps {os.strerror(errno.ENOSPC)}: {text}"
    return None


def standard_output_is_refused() -> bool:
    """Whether the error that just occurred may come from standard output: a full disk, or a reader that closed it."""
    try:
        sys.stdout.flush()  # what could not be written is still there, unless nothing is buffered
        poller = select.poll()
        poller.register(sys.stdout, 0)
        return any(event & select.POLLERR for _, event in poller.poll(0))
    except io.UnsupportedOperation:  # no file, as in a notebook
        return False
    except OSError:
        return True


def user_message(error: Exception) -> tuple[str, ...] | None:
    """The lines that a user sees for `error`; None if it is a bug in the program."""
    if isinstance(error, UserError):
        return tuple(map(str, error.args))
    refusal = disk_refusal(error)
    if not refusal:
        return None
    return (f"a file or standard output was refused ({refusal}): fix this, then run the same command again",)


def unknown_key_message(kind: str, key: str, known: Iterable[str]) -> str:
    """One line naming an unknown `key` and the nearest known one."""
    by_letters = {name.lower(): name for name in known}
    nearest = difflib.get_close_matches(key.lower(), by_letters, n=1, cutoff=_LIKENESS)
    hint = f"; did you mean {by_letters[nearest[0]]!r}?" if nearest else ""
    return f"unknown {kind} {key!r}{hint}"
