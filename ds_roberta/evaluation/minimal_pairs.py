"""Grammatical knowledge, tested with minimal pairs: how often is the acceptable sentence the more likely one?

Reads BLiMP's JSON lines (Warstadt et al. 2020): `sentence_good`, `sentence_bad`, `UID` (the phenomenon) and,
optionally, `field`. A pair is correct if the acceptable sentence has the higher score, which is BLiMP's own rule, so a
tie is wrong: the model does not distinguish the two, and half a point would hide that. Ties are counted, so that the
other rule can be applied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import orjson

from ds_roberta.distributed import logger
from ds_roberta.errors import UserError
from ds_roberta.evaluation.pseudo_likelihood import Sentence, encode, pseudo_log_likelihoods
from ds_roberta.evaluation.roberta_folder import RobertaFolder, open_roberta
from ds_roberta.files import check_output_file, write_figures


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
    """The accuracy on a group of pairs, `correct / pairs`."""

    pairs: int
    correct: int
    ties: int
    accuracy: float


@dataclass(frozen=True)
class Report:
    """Accuracies by phenomenon and field, and their mean over phenomena, which have equally many pairs in BLiMP."""

    mean_accuracy: float
    phenomena: dict[str, Accuracy]
    fields: dict[str, Accuracy]


def evaluate_minimal_pairs(
    model: Path, data: Sequence[Path], metric: str = "original", precision: str = "fp32", json_path: Path | None = None
) -> Report:
    """Score all pairs, print the accuracy of each phenomenon and field, and write the same as JSON.

    Args:
        model: a transformers folder.
        data: `.jsonl` files, or folders of them.
        metric: one of `pseudo_likelihood.METRICS`.
        precision: a key of `roberta_folder.PRECISIONS`.

    Raises:
        UserError: the model, a line of the data or the JSON's path is wrong.
    """
    check_output_file("--json", json_path)
    pairs = [pair for path in _files(data) for pair in read_pairs(path)]
    folder = open_roberta(model, precision)
    report = score_pairs(folder, pairs, metric)
    print(_table(report))
    settings = {"model": str(model), "data": [str(path) for path in data], "metric": metric, "precision": precision}
    write_figures(json_path, {**settings, **asdict(report)})
    return report


def score_pairs(folder: RobertaFolder, pairs: Sequence[Pair], metric: str) -> Report:
    """Score pairs and compute the accuracy.

    Raises:
        UserError: a sentence has more tokens than the model has positions.
    """
    sentences = encode(folder, [sentence for pair in pairs for sentence in (pair.good, pair.bad)])
    _check_lengths(folder, pairs, sentences)
    scores = pseudo_log_likelihoods(folder, sentences, metric).reshape(-1, 2)
    margins = (scores[:, 0] - scores[:, 1]).tolist()
    phenomena = _by_group([pair.phenomenon for pair in pairs], margins)
    fields = _by_group([pair.field for pair in pairs], margins)
    return Report(fmean(group.accuracy for group in phenomena.values()), phenomena, fields)


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file of JSON lines; empty lines are skipped.

    Raises:
        UserError: the file cannot be read or has no pair, or a line is not a JSON object or lacks a field.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({error}): choose a file of JSON lines in UTF-8") from error
    pairs = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise UserError(f"{str(path)!r} is empty: choose a file with one pair of sentences per line")
    return pairs


def _parse(line: str, place: str) -> Pair:
    try:
        entry = orjson.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}): a line must be an object with sentence_good, …") from error
    if not isinstance(entry, dict):
        raise UserError(f"{place}: not a JSON object but {line[:40]!r}: a line must be one with sentence_good, …")
    for name in ("sentence_good", "sentence_bad", "UID"):
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            raise UserError(f"{place}: {name!r} is {entry.get(name)!r}: every line needs it as text, as in BLiMP")
    field = str(entry.get("field") or "").replace("/", "_")  # BLiMP writes syntax/semantics and syntax_semantics
    return Pair(entry["sentence_good"], entry["sentence_bad"], entry["UID"], field, place)


def _files(data: Sequence[Path]) -> list[Path]:
    files = []
    for path in data:
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found or not path.exists():
            what = "has no .jsonl file" if path.is_dir() else "does not exist"
            raise UserError(f"--data {str(path)!r} {what}: choose BLiMP's .jsonl files or a folder of them")
        files += found
    return files


def _check_lengths(folder: RobertaFolder, pairs: Sequence[Pair], sentences: Sequence[Sentence]) -> None:
    for number, sentence in enumerate(sentences):
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
    correct = sum(margin > 0 for margin in margins)
    return Accuracy(len(margins), correct, sum(margin == 0 for margin in margins), correct / len(margins))


def _table(report: Report) -> str:
    width = max(map(len, [*report.phenomena, *report.fields, "mean of phenomena"]))

    def rows(groups: dict[str, Accuracy]) -> Iterable[str]:
        for name, group in groups.items():
            yield f"{name:<{width}}  {group.pairs:>7,}  {group.ties:>5,}  {group.accuracy:8.1%}"

    header = f"{'':<{width}}  {'pairs':>7}  {'ties':>5}  {'accuracy':>8}"
    fields = [*rows(report.fields), ""] if report.fields else []
    mean = f"{'mean of phenomena':<{width}}  {'':>7}  {'':>5}  {report.mean_accuracy:8.1%}"
    return "\n".join([header, *rows(report.phenomena), "", *fields, mean])
