"""Where an evaluation's figures go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_roberta.errors import UserError
from ds_roberta.files import errors_of_the_disk, write_json


def check_report_path(path: Path | None) -> None:
    """Raise `UserError` before the work, not behind it, where the file cannot be written."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"--json {str(path)!r} is a folder or lies in none: give a file in a folder that exists")


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Write the figures as JSON, whole or not at all; nothing where there is no path.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        return
    with errors_of_the_disk(path):
        write_json(path, report)
