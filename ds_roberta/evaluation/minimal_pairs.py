"""Grammatical knowledge, tested with minimal pairs: how often is the acceptable sentence the more likely one?

Reads tables like BLiMP's JSON lines (Warstadt et al. 2020): `sentence_good`, `sentence_bad`, `UID` (the phenomenon;
BLiMP itself calls it a paradigm, and groups of them phenomena) and, optionally, `field`. A pair is correct if the
acceptable sentence has the higher score, which is BLiMP's own rule, so a tie is wrong: the model does not distinguish
the two, and half a point would hide that. Ties are counted, and the accuracy in which they count half, as in a guess,
is given beside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import orjson

from ds_roberta.errors import UserError
from ds_roberta.evaluation.pseudo_likelihood import METRICS, Sentence, encode, pseudo_log_likelihoods
from ds_roberta.evaluation.roberta_folder import PRECISIONS, RobertaFolder, open_roberta
from ds_roberta.files import atomic_path, check_output_file, errors_of_the_disk, write_figures
from ds_roberta.inputs.paths import is_saved
from ds_roberta.inputs.streams import format_of, is_url, without_format
from ds_roberta.inputs.tables import TABULAR, TABULAR_NAMES, read_table
from ds_roberta.options import Settings, option, require_one_of
from ds_roberta.process import logger

PHENOMENON = "UID"


@dataclass(frozen=True)
class PairOptions(Settings):
    """Pairs of sentences."""

    good_column: str = option("column of the acceptable sentence", "sentence_good")
    bad_column: str = option("column of the unacceptable sentence", "sentence_bad")
    phenomenon_column: str | None = option(
        f"column of what a pair tests (default: {PHENOMENON}, or for a file without it the file's name)", None
    )
    pairs: Path | None = option(
        "also write each pair's sentences with their scores to this file, as JSON lines", None, metavar="FILE"
    )


@dataclass(frozen=True)
class Pair:
    """One minimal pair; `place` is its file and line, and `field` is empty if the data has none."""

    good: str
    bad: str
    phenomenon: str
    field: str
    place: str


@dataclass(frozen=True)
class Accuracy:
    """The accuracy on a group of pairs, `correct / pairs`, and the one in which a tie counts half."""

    pairs: int
    correct: int
    ties: int
    accuracy: float
    accuracy_with_half_ties: float


@dataclass(frozen=True)
class Report:
    """Accuracies by phenomenon and field, their means over phenomena, and the accuracy on all pairs.

    The two are equal where all phenomena have as many pairs, as BLiMP's paradigms have.
    """

    mean_accuracy: float
    mean_accuracy_with_half_ties: float
    overall: Accuracy
    phenomena: dict[str, Accuracy]
    fields: dict[str, Accuracy]


def evaluate_minimal_pairs(
    model: Path,
    data: Sequence[str | Path],
    metric: str = "original",
    precision: str = "fp32",
    json_path: Path | None = None,
    options: PairOptions | None = None,
) -> Report:
    """Score all pairs, print the accuracy of each phenomenon and field, and write the same as JSON.

    Args:
        model: a transformers folder.
        data: tables, see `read_table`, or folders of them.
        metric: one of `pseudo_likelihood.METRICS`.
        precision: a key of `roberta_folder.PRECISIONS`.
        options: None: their defaults.

    Raises:
        UserError: the model, a line of the data or a path of the output is wrong.
    """
    options = options or PairOptions()
    require_one_of("--metric", metric, METRICS)
    require_one_of("--precision", precision, PRECISIONS)
    files = _files(data)
    _check_outputs(json_path, options.pairs, files)
    pairs = [pair for path in files for pair in read_pairs(path, options)]
    folder = open_roberta(model, precision)
    scores = score_pairs(folder, pairs, metric)
    report = make_report(pairs, scores)
    print(_table(report))
    if options.pairs is not None:
        write_pairs(options.pairs, pairs, scores)
    settings = {"model": str(model), "data": [str(path) for path in data], "metric": metric, "precision": precision}
    write_figures(json_path, {**settings, **asdict(report)})
    return report


def score_pairs(folder: RobertaFolder, pairs: Sequence[Pair], metric: str) -> np.ndarray:
    """The scores, in nats, of the acceptable and the unacceptable sentence of each pair: (pairs, 2) float64.

    Raises:
        UserError: a sentence has no tokens, or more than the model has positions.
    """
    sentences = encode(folder, [sentence for pair in pairs for sentence in (pair.good, pair.bad)])
    _check_lengths(folder, pairs, sentences)
    return pseudo_log_likelihoods(folder, sentences, metric).reshape(-1, 2)


def make_report(pairs: Sequence[Pair], scores: np.ndarray) -> Report:
    """The accuracies; `scores` as from `score_pairs`."""
    margins = (scores[:, 0] - scores[:, 1]).tolist()
    phenomena = _by_group([pair.phenomenon for pair in pairs], margins)
    fields = _by_group([pair.field for pair in pairs], margins)
    mean = fmean(group.accuracy for group in phenomena.values())
    half = fmean(group.accuracy_with_half_ties for group in phenomena.values())
    return Report(mean, half, _accuracy(margins), phenomena, fields)


def write_pairs(path: Path, pairs: Sequence[Pair], scores: np.ndarray) -> None:
    """Write each pair with its scores, as from `score_pairs`, as a line of JSON, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    with errors_of_the_disk(path), atomic_path(path) as temporary, temporary.open("wb") as file:
        for pair, (good, bad) in zip(pairs, scores.tolist(), strict=True):
            row = {**asdict(pair), "good_score": good, "bad_score": bad, "margin": good - bad, "correct": good > bad}
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))


def read_pairs(path: str | Path, options: PairOptions) -> list[Pair]:
    """The pairs of a table.

    Raises:
        UserError: the file cannot be read or has no row, or a row lacks a column.
    """
    table = read_table(path)
    column = options.phenomenon_column or PHENOMENON
    of_file = {}
    if options.phenomenon_column is None and column not in table.columns:
        name = Path(path).name
        of_file = {column: without_format(name) if format_of(name, TABULAR) else name}
    columns = (options.good_column, options.bad_column, column)
    return [_pair({**row, **of_file}, columns, table.place(index)) for index, row in enumerate(table.rows)]


def _pair(entry: dict[str, Any], columns: tuple[str, str, str], place: str) -> Pair:
    for name, letter in zip(columns, ("good", "bad", "phenomenon"), strict=True):
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            raise UserError(
                f"{place}: {name!r} is {entry.get(name)!r}: every row needs it as text; if another column has it, give "
                f"that as --{letter}_column"
            )
    field = "" if entry.get("field") is None else str(entry["field"])
    field = field.replace("/", "_")  # BLiMP writes syntax/semantics and syntax_semantics
    good, bad, phenomenon = (entry[name] for name in columns)
    return Pair(good, bad, phenomenon, field, place)


def _check_outputs(json_path: Path | None, pairs_path: Path | None, files: Sequence[str]) -> None:
    """Raise `UserError` if the outputs could not be written, or would replace each other or the data."""
    check_output_file("--json", json_path)
    check_output_file("--pairs", pairs_path)
    taken = {Path(path).resolve() for path in files}
    for name, path in (("--json", json_path), ("--pairs", pairs_path)):
        if path is not None and path.resolve() in taken:
            raise UserError(f"{name} {str(path)!r} is also the data or another output: choose another file")
        taken |= {path.resolve()} if path is not None else set()


def _files(data: Sequence[str | Path]) -> list[str]:
    files = []
    for path in map(str, data):
        found = [path]
        if Path(path).is_dir() and not is_saved(path):
            found = [str(file) for file in sorted(Path(path).iterdir()) if format_of(file.name, TABULAR)]
            if folders := [file.name for file in sorted(Path(path).iterdir()) if file.is_dir()]:
                logger.warning(f"--data {path!r}: not read are the folders in it: {', '.join(folders)}")
        elif not is_url(path) and not Path(path).exists():
            raise UserError(f"--data {path!r} does not exist: choose tables like BLiMP's, or folders of them")
        if not found:
            raise UserError(f"--data {path!r} has no table ({TABULAR_NAMES}): choose a folder of BLiMP's files")
        files += found
    resolved = Counter(path if is_url(path) else str(Path(path).resolve()) for path in files)
    if twice := [path for path, count in resolved.items() if count > 1]:
        raise UserError(f"--data has {twice[0]!r} {resolved[twice[0]]} times: name each table once")
    return files


def _check_lengths(folder: RobertaFolder, pairs: Sequence[Pair], sentences: Sequence[Sentence]) -> None:
    for number, sentence in enumerate(sentences):
        if not sentence.ids:
            raise UserError(f"{pairs[number // 2].place}: the tokenizer leaves nothing of a sentence: leave it out")
        length = len(sentence.ids) + 2
        if length > folder.max_positions:
            raise UserError(
                f"{pairs[number // 2].place}: a sentence has {length} tokens with <s> and </s>, the model has "
                f"{folder.max_positions} positions: shorten it or leave it out"
            )
    longer = [number for number, sentence in enumerate(sentences) if len(sentence.ids) + 2 > folder.max_seq_length]
    if longer:
        logger.warning(
            f"{len(longer)} sentences are longer than the {folder.max_seq_length} tokens that the model was trained "
            f"on, first {pairs[longer[0] // 2].place}: later positions have learned nothing"
        )


def _by_group(names: Sequence[str], margins: Sequence[float]) -> dict[str, Accuracy]:
    """The accuracy on each name's pairs; pairs with an empty name are left out."""
    groups: dict[str, list[float]] = {}
    for name, margin in zip(names, margins, strict=True):
        if name:
            groups.setdefault(name, []).append(margin)
    return {name: _accuracy(group) for name, group in sorted(groups.items())}


def _accuracy(margins: Sequence[float]) -> Accuracy:
    pairs, correct, ties = len(margins), sum(margin > 0 for margin in margins), margins.count(0)
    return Accuracy(pairs, correct, ties, correct / pairs, (correct + ties / 2) / pairs)


def _table(report: Report) -> str:
    width = max(map(len, [*report.phenomena, *report.fields, "mean of phenomena"]))

    def rows(groups: dict[str, Accuracy]) -> Iterable[str]:
        for name, group in groups.items():
            accuracies = f"{group.accuracy:8.1%}  {group.accuracy_with_half_ties:14.1%}"
            yield f"{name:<{width}}  {group.pairs:>7,}  {group.ties:>5,}  {accuracies}"

    header = f"{'':<{width}}  {'pairs':>7}  {'ties':>5}  {'accuracy':>8}  {'with half ties':>14}"
    fields = [*rows(report.fields), ""] if report.fields else []
    means = f"{report.mean_accuracy:8.1%}  {report.mean_accuracy_with_half_ties:14.1%}"
    mean = f"{'mean of phenomena':<{width}}  {'':>7}  {'':>5}  {means}"
    return "\n".join([header, *rows(report.phenomena), "", *fields, *rows({"all pairs": report.overall}), mean])
