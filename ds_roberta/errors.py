"""Errors that a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something outside the program is wrong: the message names it, its value and the remedy, in one line."""


def unknown_key_message(kind: str, key: str, known: Iterable[str]) -> str:
    """One line naming an unknown `key` and the nearest known one."""
    nearest = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {kind} {key!r}{hint}"
