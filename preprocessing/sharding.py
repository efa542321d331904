"""From a plan to a data folder: units are tokenized by workers in any order, the manifest is written last."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import xxhash

import ds_roberta
from ds_roberta.data.shards import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_FOLDER,
    TRAIN_SPLIT,
    VALIDATION_SPLIT,
    InputInfo,
    Manifest,
    ShardInfo,
    TokenizerInfo,
    write_shard,
)
from ds_roberta.errors import UserError
from ds_roberta.files import created_parents, errors_of_the_disk, file_checksum, json_fingerprint
from preprocessing import dedup
from preprocessing.job import FIRST_STAGE, UNITS, Job, Record, Task, clear, opened_job, publish
from preprocessing.lease import LeaseHeld, held_lease
from preprocessing.plan import UNIT_BYTES, Unit, plan_units
from preprocessing.progress import document_bar
from preprocessing.readers import KEPT, ReadOptions, accepted_documents, sentences, tokenizer_lines
from preprocessing.tokenizer import TOKENIZER_FILES, Encoder, copy_tokenizer
from preprocessing.workers import Workers, local_workers

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 1_000, 1_000_000


@dataclass(frozen=True)
class ShardOptions:
    """All that the output's bytes depend on beside the input and the tokenizer."""

    read: ReadOptions = field(default_factory=ReadOptions)
    validation_fraction: float = 0.01
    unit_bytes: int = UNIT_BYTES
    dedup: str = "none"


@dataclass(frozen=True)
class UnitResult:
    """What a unit became: its shard in each split that got a document, and counts by input file."""

    shards: dict[str, ShardInfo]
    counts: dict[str, Counter[str]]
    text_bytes: int

    @property
    def documents(self) -> int:
        return sum(counts[KEPT] for counts in self.counts.values())

    def record(self) -> Record:
        """As JSON can hold it."""
        shards = {split: asdict(shard) for split, shard in self.shards.items()}
        return {"shards": shards, "counts": self.counts, "text_bytes": self.text_bytes}

    @classmethod
    def from_record(cls, record: Record) -> UnitResult:
        """The inverse of `record`, behind a way through JSON."""
        shards = {
            split: ShardInfo(**{**shard, "chunk_checksums": tuple(shard["chunk_checksums"])})
            for split, shard in record["shards"].items()
        }
        counts = {path: Counter(counts) for path, counts in record["counts"].items()}
        return cls(shards, counts, record["text_bytes"])


def is_data_folder(folder: Path) -> bool:
    """Whether `folder` was written by `shard_corpus`, so that it may be replaced."""
    try:
        content = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        return {"format_version", "fingerprint", "splits"} <= content.keys()
    except (OSError, ValueError, AttributeError):
        return False


def shard_corpus(
    files: Sequence[str], tokenizer: Path, output: Path, options: ShardOptions, workers: int
) -> tuple[Manifest, int]:
    """As `run_job`, on so many processes of this machine."""
    with local_workers(workers) as local:
        result = run_job(files, tokenizer, output, options, local)
    assert result is not None
    return result


def run_job(
    files: Sequence[str],
    tokenizer: Path,
    output: Path,
    options: ShardOptions,
    workers: Workers,
    task: Task | None = None,
) -> tuple[Manifest, int] | None:
    """Tokenize `files` into the data folder `output`, which appears whole or not at all.

    Units that an earlier run of the same plan finished are not done again.

    Args:
        task: the process is this one of several that share the job without knowing of each other; each does its part
            of the units, and the one that finishes the last of them puts the output into place.

    Returns:
        The manifest, and the bytes of text that were kept; None where other tasks still have work, or did the rest.

    Raises:
        UserError: bad input, a tokenizer of another kind, an output that cannot be written or is being written, no
            training document.
    """
    units = plan_units(files, options.read, options.unit_bytes)
    output = output.resolve()  # a link stays, what it points to is replaced
    inside = [path for path in files if output in Path(path).resolve().parents]
    if inside:
        raise UserError(f"the input {inside[0]!r} lies in the output {str(output)!r}: give another --output")
    share = units if task is None else units[task[0] :: task[1]]
    if not share:
        print(f"nothing to do: {len(units)} units are fewer than {task and task[1]} tasks")
        return None
    plan = _plan_fingerprint(files, units, tokenizer, options)
    with (
        errors_of_the_disk(output),
        created_parents(output),
        opened_job(output, plan, task, is_data_folder, "a folder of prepared data") as job,
        _naming_what_is_kept(job, len(units)),
        workers,
    ):
        if job.record(FIRST_STAGE, 0) is None:
            job.do(FIRST_STAGE, 0, partial(_copy_tokenizer, tokenizer))
        results = _run_units(job, share, options, workers)
        if task is None:
            return _finish(job, files, units, results, options, workers, output)
        left = len(units) - job.finished(UNITS)
        if left and job.folder.exists():
            print(f"task {task[0] + 1}/{task[1]} is done; {left} of {len(units)} units are left to others, the last")
            print("of which puts the output into place (as does this command without a task, if they have ended)")
            return None
        try:
            with held_lease(job.folder.parent / "finishing", plan, None, output):
                if not job.folder.exists():  # another finished meanwhile
                    return None
                results = _run_units(job, units, options, workers)
                return _finish(job, files, units, results, options, workers, output)
        except LeaseHeld:
            return None


def _plan_fingerprint(files: Sequence[str], units: Sequence[Unit], tokenizer: Path, options: ShardOptions) -> str:
    """Identity of all that the output's bytes depend on: work is gone on with only where it is the same."""
    states = [os.stat(path) for path in files]
    content = {
        "versions": [ds_roberta.__version__, FORMAT_VERSION],
        "inputs": [[path, state.st_size, state.st_mtime_ns] for path, state in zip(files, states, strict=True)],
        "units": [asdict(unit) for unit in units],
        "tokenizer": {
            name: file_checksum(tokenizer / name) for name in TOKENIZER_FILES if (tokenizer / name).is_file()
        },
        "options": [asdict(options), dedup.dedup_options(options.dedup)],
    }
    return json_fingerprint(content)


@contextmanager
def _naming_what_is_kept(job: Job, units: int) -> Iterator[None]:
    try:
        yield
    except (UserError, KeyboardInterrupt) as error:
        finished = job.finished(UNITS)
        kept = f"{finished} of {units} units are kept in {job.folder.parent} for the same command"
        if finished and isinstance(error, UserError):
            raise type(error)(f"{error} ({kept})") from error
        if finished:
            print(kept, file=sys.stderr)
        raise


def _copy_tokenizer(tokenizer: Path, scratch: Path) -> Record:
    (scratch / "data").mkdir()
    return asdict(copy_tokenizer(tokenizer, scratch / "data" / TOKENIZER_FOLDER))


def _run_units(job: Job, units: Sequence[Unit], options: ShardOptions, workers: Workers) -> dict[int, UnitResult]:
    """Do what is not finished of `units`; the results of all, by the units' numbers."""
    records = {unit.index: job.record(UNITS, unit.index) for unit in units}
    results = {index: UnitResult.from_record(record) for index, record in records.items() if record is not None}
    missing = [unit for unit in units if unit.index not in results]
    if results and missing:
        print(f"going on: {len(results)} of {len(units)} units are finished", flush=True)
    if missing:
        info = TokenizerInfo.read(job.data / TOKENIZER_FOLDER)
        sizes = {unit.index: unit.bytes for unit in units}
        done = sum(sizes[index] for index in results)
        with document_bar(sum(sizes.values()), "tokenizing", done) as update:
            for index, record in workers.run(partial(_unit_step, job, info, options), missing):
                results[index] = UnitResult.from_record(record)
                update(sizes[index], results[index].documents)
    return results


def _unit_step(job: Job, info: TokenizerInfo, options: ShardOptions, unit: Unit) -> tuple[int, Record]:
    work = partial(_shard_unit, job.data / TOKENIZER_FOLDER, info, options, unit)
    return unit.index, job.do(UNITS, unit.index, work)


def _finish(
    job: Job,
    files: Sequence[str],
    units: Sequence[Unit],
    results: dict[int, UnitResult],
    options: ShardOptions,
    workers: Workers,
    output: Path,
) -> tuple[Manifest, int]:
    """From finished units to the output in its place."""
    if options.dedup != "none":
        results = _deduplicate(job, results, options.dedup, workers)
    in_order = [results[unit.index] for unit in units]
    text_bytes = sum(result.text_bytes for result in in_order)
    if job.is_published:
        clear(job)
        return Manifest.read(output), text_bytes
    manifest = Manifest(
        tokenizer=TokenizerInfo.read(job.data / TOKENIZER_FOLDER),
        options={
            **asdict(options.read),
            "validation_fraction": options.validation_fraction,
            "unit_bytes": options.unit_bytes,
            **dedup.dedup_options(options.dedup),
        },
        inputs=_input_infos(files, in_order),
        splits={split: tuple(r.shards[split] for r in in_order if split in r.shards) for split in SPLITS},
    )
    try:
        _check_train_split(manifest, options)
    except UserError:
        clear(job)  # the same command would end here again
        raise
    manifest.write(job.data)
    publish(job, output)
    return manifest, text_bytes


def _deduplicate(job: Job, results: dict[int, UnitResult], kind: str, workers: Workers) -> dict[int, UnitResult]:
    """The results of all units without the documents that occur again."""
    documents = sum(result.documents for result in results.values())
    merges = [i for i in range(dedup.merge_count(kind, documents)) if job.record("drops", i) is None]
    for _ in workers.run(partial(_merge_step, job, kind, len(results), documents), merges):
        pass
    records = {index: job.record("final", index) for index in results}
    final = {index: UnitResult.from_record(record) for index, record in records.items() if record is not None}
    left = [(index, result) for index, result in sorted(results.items()) if index not in final]
    for index, record in workers.run(partial(_final_step, job, kind, documents), left):
        final[index] = UnitResult.from_record(record)
    return final


def _merge_step(job: Job, kind: str, units: int, documents: int, index: int) -> Record:
    work = partial(_merge, job.folder, kind, units, documents, index)
    return job.do("drops", index, work)


def _merge(folder: Path, kind: str, units: int, documents: int, index: int, scratch: Path) -> Record:
    return dedup.merge(folder, scratch, kind, units, documents, index)


def _final_step(job: Job, kind: str, documents: int, item: tuple[int, UnitResult]) -> tuple[int, Record]:
    index, result = item
    record = job.do("final", index, partial(_final, job, kind, documents, index, result))
    for shard in result.shards.values():  # on disk a unit is never there twice for long
        (job.folder / "staged" / shard.file).unlink(missing_ok=True)
    return index, record


def _final(job: Job, kind: str, documents: int, index: int, result: UnitResult, scratch: Path) -> Record:
    rows = dedup.load_rows(job.folder, index)
    keep = np.ones(len(rows), bool)
    counts, text_bytes = {path: Counter(c) for path, c in result.counts.items()}, result.text_bytes
    for reason, dropped in dedup.dropped_rows(job.folder, kind, documents, index).items():
        keep[dropped] = False
        text_bytes -= dedup.take_back(counts, KEPT, rows[dropped], reason)
    ids = TokenizerInfo.read(job.data / TOKENIZER_FOLDER).vocab_size
    shards = dedup.write_without(
        job.folder / "staged", scratch / "data", result.shards, rows["split"], keep, index, ids
    )
    return UnitResult(shards, counts, text_bytes).record()


def split_of(text: str, validation_fraction: float) -> str:
    """The split of a document, by its text alone: it does not move when the corpus grows."""
    place = xxhash.xxh3_64_intdigest(text.encode("utf-8")) / 2**64
    return VALIDATION_SPLIT if place < validation_fraction else TRAIN_SPLIT


def _shard_unit(tokenizer: Path, info: TokenizerInfo, options: ShardOptions, unit: Unit, scratch: Path) -> Record:
    encoder = _encoder(tokenizer, info)
    counts = {piece.path: Counter[str]() for piece in unit.pieces}
    paths = list(counts)
    table = dedup.DocumentTable(options.dedup)
    rows: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {split: [] for split in SPLITS}
    text_bytes = 0
    for piece in unit.pieces:
        texts = accepted_documents(piece, options.read, counts[piece.path])
        for batch in _batches(sentences(text) for text in texts):
            for document, row in zip(batch, encoder.encode([tokenizer_lines(lines) for lines in batch]), strict=True):
                text = "\n".join(document)
                text_bytes += len(text.encode("utf-8"))
                split = split_of(text, options.validation_fraction)
                rows[split].append(row)
                if options.dedup != "none":
                    table.add(text, split, paths.index(piece.path))
    shards = {}
    target = scratch / ("data" if options.dedup == "none" else "staged")
    for split, split_rows in rows.items():
        if split_rows:
            ids, ends = zip(*split_rows, strict=True)
            shards[split] = write_shard(target, split, unit.index, ids, ends, info.vocab_size)
    if options.dedup != "none":
        table.write(scratch, unit.index)
    return UnitResult(shards, counts, text_bytes).record()


@lru_cache(maxsize=1)
def _encoder(folder: Path, info: TokenizerInfo) -> Encoder:
    """Loaded once in a process; `info` tells two tokenizers apart that lay in the same place one after the other."""
    return Encoder(folder, info)


def _batches(documents: Iterable[list[str]]) -> Iterator[list[list[str]]]:
    batch: list[list[str]] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += sum(map(len, document))
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _input_infos(files: Sequence[str], results: Iterable[UnitResult]) -> tuple[InputInfo, ...]:
    totals = {path: Counter[str]() for path in files}
    for result in results:
        for path, counts in result.counts.items():
            totals[path] += counts
    return tuple(
        InputInfo(path, counts.total(), counts.pop(KEPT, 0), dict(sorted(counts.items())))
        for path, counts in totals.items()
    )


def _check_train_split(manifest: Manifest, options: ShardOptions) -> None:
    if manifest.documents(TRAIN_SPLIT):
        return
    if manifest.documents(VALIDATION_SPLIT):
        raise UserError(
            f"all {manifest.documents(VALIDATION_SPLIT)} documents fell into validation: "
            f"lower --validation_fraction {options.validation_fraction} or give more documents"
        )
    raise UserError(f"the corpus is empty: no document with text in {len(manifest.inputs)} input file(s)")
