"""From a plan to a data folder: workers tokenize units in any order, and the manifest is written last."""

from __future__ import annotations

import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import ds_roberta
from ds_roberta.data.manifest import (
    FORMAT_VERSION,
    PACKING_VERSION,
    SPLITS,
    TOKENIZER_FOLDER,
    TRAIN_SPLIT,
    VALIDATION_SPLIT,
    Manifest,
    is_data_folder,
)
from ds_roberta.data.tokenizer import TokenizerInfo
from ds_roberta.errors import UserError
from ds_roberta.files import (
    TOKENIZER_FILES,
    created_parents,
    errors_of_the_disk,
    file_checksum,
    json_fingerprint,
    partial_folder,
)
from ds_roberta.inputs.streams import file_size, is_url, open_binary, readable
from ds_roberta.lease import LeaseHeld, Task, held_lease
from ds_roberta.progress import document_bar
from preprocessing import dedup
from preprocessing.jobs.job import (
    FIRST_PHASE,
    UNITS,
    Job,
    Record,
    clear,
    opened_job,
    publish,
)
from preprocessing.jobs.workers import Workers
from preprocessing.reading.accounts import BadDocuments, filter_checksum, input_infos, refuse_damage, total_accounts
from preprocessing.reading.planning import Unit, plan_units
from preprocessing.tokens.corpus_tokenizer import copy_tokenizer
from preprocessing.tokens.encoders import AUTO, HUGGINGFACE, HuggingFaceEncoder, choose_backend, make_encoder
from preprocessing.tokens.sentence_splitting import RULES_VERSION
from preprocessing.units import RECORD_VERSION, ShardOptions, UnitResult, shard_unit, thin_unit

FileState = tuple[int, int]
"""The size and modification time of an input."""


class _InputChanged(UserError):
    """The plan of the job is of inputs that are no longer there, so nothing of it can be resumed."""


class Totals(NamedTuple):
    """Sums over all units."""

    text_bytes: int
    special_documents: int
    unknown_tokens: int


def run_job(
    files: Sequence[str],
    tokenizer: Path,
    output: Path,
    options: ShardOptions,
    workers: Workers,
    sources: Mapping[str, str] | None = None,
    backend: str = AUTO,
    task: Task | None = None,
) -> tuple[Manifest, Totals] | None:
    """Tokenize `files` into the data folder `output`, which appears whole or not at all.

    Units that an earlier run of the same plan finished are kept.

    Args:
        sources: the source's name of every file that has one.
        backend: one of `encoders.BACKENDS`; the ids are the same with each.
        task: this process, if several share the job without talking to each other; each does its share of the units,
            and the last to finish moves the output into place.

    Returns:
        The manifest and the totals; None if other tasks still have work, or finished the job.

    Raises:
        UserError: too much bad input, the wrong kind of tokenizer, an output that cannot be written or that another
            job is writing, no training document.
    """
    states = {path: _state(path) for path in files}
    units = plan_units(files, options.read, options.unit_bytes, sources, options.allow_damaged_files)
    output = output.resolve()  # a link stays; its target is replaced
    inside = [path for path in files if not is_url(path) and output in Path(path).resolve().parents]
    if inside:
        raise UserError(f"the input {inside[0]!r} is inside the output {str(output)!r}: choose another --output")
    share = units if task is None else units[task[0] :: task[1]]
    if not share:
        print(f"nothing to do: there are only {len(units)} units for {task and task[1]} tasks")
        return None
    plan = _plan_fingerprint(states, units, tokenizer, options)
    if task is not None and _is_made(output, plan):
        print(f"nothing to do: these tasks have made {output}; remove it to make it again")
        return None
    with (
        errors_of_the_disk(output),
        created_parents(output),
        opened_job(output, plan, task, is_data_folder, "a folder of prepared data") as job,
        _naming_what_is_kept(job, len(units), output),
        workers,
    ):
        if job.record(FIRST_PHASE, 0) is None:
            job.do(FIRST_PHASE, 0, partial(_copy_tokenizer, tokenizer))
        sharding = _Sharding(job, states, sources or {}, units, options, backend, workers, output)
        if task is None:
            return sharding.finish()
        sharding.run_units(share)
        left = len(units) - job.finished(UNITS)
        if left and job.folder.exists():
            print(f"task {task[0] + 1}/{task[1]} is done; {left} of {len(units)} units are left to other tasks.")
            print("The last to finish moves the output into place; if all have ended, run the command with --task 1/1.")
            return None
        try:
            with held_lease(job.folder.parent / "finishing", plan, None, output):
                if not job.folder.exists():  # another task has finished
                    return None
                return sharding.finish()
        except LeaseHeld:
            return None


def _is_made(output: Path, plan: str) -> bool:
    """Whether the output has the plan's data, and nothing is left to do."""
    try:
        return not partial_folder(output).exists() and Manifest.parse(output).plan == plan
    except UserError:  # there is none, or it is damaged: the tasks make it
        return False


def _plan_fingerprint(
    states: Mapping[str, FileState], units: Sequence[Unit], tokenizer: Path, options: ShardOptions
) -> str:
    """Return a fingerprint of everything that the output's bytes depend on: work is resumed only if it is the same."""
    # The records show what is bad or damaged, so a job that allows more can resume.
    decisive = replace(options, max_bad_fraction=0.0, allow_damaged_files=False)
    content = {
        "versions": [ds_roberta.__version__, FORMAT_VERSION, RECORD_VERSION],
        "inputs": [[path, *state] for path, state in states.items()],
        "units": [asdict(unit) for unit in units],
        "tokenizer": {
            name: file_checksum(tokenizer / name) for name in TOKENIZER_FILES if (tokenizer / name).is_file()
        },
        "options": [
            asdict(decisive),
            dedup.dedup_options(options.dedup),
            filter_checksum(options.read.filter),
            *([RULES_VERSION] if options.read.sentences == "rules" else []),
        ],
    }
    return json_fingerprint(content)


def _state(path: str) -> FileState:
    """Return the size and modification time of an input; of a URL only the size, as some file systems know no more."""
    with readable(path):
        if not is_url(path):
            state = os.stat(path)
            return state.st_size, state.st_mtime_ns
        with open_binary(path) as file:
            return file_size(file), 0


@contextmanager
def _naming_what_is_kept(job: Job, units: int, output: Path) -> Iterator[None]:
    try:
        with errors_of_the_disk(output):
            yield
    except _InputChanged:
        raise
    except (UserError, KeyboardInterrupt) as error:
        finished = job.finished(UNITS)
        kept = (
            f"{finished} of {units} units are kept in {job.folder.parent} for the same command with the same inputs "
            "and filter; only --max_bad_fraction and --allow_damaged_files may differ"
        )
        if finished and isinstance(error, UserError):
            raise type(error)(f"{error} ({kept})") from error
        if finished:
            print(kept, file=sys.stderr)
        raise


def _copy_tokenizer(tokenizer: Path, scratch: Path) -> Record:
    (scratch / "data").mkdir()
    return asdict(copy_tokenizer(tokenizer, scratch / "data" / TOKENIZER_FOLDER))


@dataclass(frozen=True)
class _Sharding:
    """The steps of a job that make its output.

    Attributes:
        states: of each input, as it was when the job was planned.
        units: all units of the plan.
    """

    job: Job
    states: Mapping[str, FileState]
    sources: Mapping[str, str]
    units: Sequence[Unit]
    options: ShardOptions
    backend: str
    workers: Workers
    output: Path

    def tokenizer_info(self) -> TokenizerInfo:
        """What the first phase recorded; for a small corpus, reading the tokenizer again would take relatively long."""
        record = self.job.record(FIRST_PHASE, 0)
        assert record is not None
        return TokenizerInfo.from_json(record)

    def run_units(self, units: Sequence[Unit], bad: BadDocuments | None = None) -> dict[int, UnitResult]:
        """Do those of `units` that are unfinished; return the results of all `units`, by unit number.

        Args:
            bad: receives the units in the plan's order; None unless `units` are all of them.
        """
        records = {unit.index: self.job.record(UNITS, unit.index) for unit in units}
        results = {index: UnitResult.from_record(record) for index, record in records.items() if record is not None}
        if not (self.options.allow_damaged_files or self.job.is_published):  # what was damaged may have been repaired
            results = {index: result for index, result in results.items() if not result.is_damaged}
        missing = [unit for unit in units if unit.index not in results]
        if results and missing:
            print(f"resuming: {len(results)} of {len(units)} units are finished", flush=True)
        waiting = deque(units)

        def judge() -> None:
            while bad is not None and waiting and waiting[0].index in results:
                bad.add(results[waiting.popleft().index].accounts)

        for result in results.values():
            self._refuse(result)
        judge()
        if missing:
            backend, choice = choose_backend(self.backend, self.job.data / TOKENIZER_FOLDER)
            if self.options.read.sentences == "rules":
                _check_rules(self.job.data / TOKENIZER_FOLDER, self.tokenizer_info())
            print(f"tokenizer backend: {choice}", flush=True)
            sizes = {unit.index: unit.bytes for unit in units}
            done = sum(sizes[index] for index in results)
            work = partial(_do_unit, self.job, self.tokenizer_info(), self.options, backend)
            with document_bar(sum(sizes.values()), "tokenizing", done) as update:
                for index, record in self.workers.run(work, missing):
                    results[index] = UnitResult.from_record(record)
                    self._refuse(results[index])
                    update(sizes[index], results[index].documents)
                    judge()
        return results

    def _refuse(self, result: UnitResult) -> None:
        """Raise `UserError` if an input of a unit has changed or is damaged."""
        for path in result.accounts:
            if not is_url(path) and _state(path) != self.states[path]:
                raise _InputChanged(
                    f"{path!r} changed while it was read: repeat the command when the file is complete; it begins again"
                )
        if not self.options.allow_damaged_files:
            refuse_damage(result.accounts)

    def finish(self) -> tuple[Manifest, Totals]:
        """Do all units, make the output from them, and move it into place."""
        job, options = self.job, self.options
        bad = BadDocuments(options.max_bad_fraction, options.read)
        results = self.run_units(self.units, bad)
        bad.check()
        try:
            bad.check_columns()
        except UserError:
            clear(job)  # the next command has other options
            raise
        if options.dedup != "none":
            results = self._deduplicate(results)
        in_order = [results[unit.index] for unit in self.units]
        totals = Totals(*(sum(getattr(result, name) for result in in_order) for name in Totals._fields))
        if job.is_published:
            clear(job)
            return Manifest.read(self.output), totals
        manifest = Manifest(
            tokenizer=self.tokenizer_info(),
            options={
                **asdict(options.read),
                "validation_fraction": options.validation_fraction,
                "unit_bytes": options.unit_bytes,
                **dedup.dedup_options(options.dedup),
                "packing_version": PACKING_VERSION,
            },
            inputs=input_infos(total_accounts(self.states, (result.accounts for result in in_order)), self.sources),
            splits={split: tuple(s for r in in_order for s in r.shards[split]) for split in SPLITS},
            plan=job.folder.name,
        )
        try:
            _check_train_split(manifest, options)
        except UserError:
            clear(job)  # the same command would fail here again
            raise
        manifest.write(job.data)
        publish(job, self.output)
        return manifest, totals

    def _deduplicate(self, results: dict[int, UnitResult]) -> dict[int, UnitResult]:
        """Rewrite the units without repeated documents; return the results."""
        job, kind = self.job, self.options.dedup
        documents = sum(result.documents for result in results.values())
        merges = [i for i in range(dedup.merge_count(kind, documents)) if job.record("drops", i) is None]
        for _ in self.workers.run(partial(_do_merge, job, len(results), documents), merges):
            pass
        records = {index: job.record("final", index) for index in results}
        final = {index: UnitResult.from_record(record) for index, record in records.items() if record is not None}
        left = [(unit, results[unit.index]) for unit in self.units if unit.index not in final]
        for index, record in self.workers.run(partial(_do_final, job, self.tokenizer_info(), kind, documents), left):
            final[index] = UnitResult.from_record(record)
        return final


def _check_rules(tokenizer: Path, info: TokenizerInfo) -> None:
    encoder, _ = make_encoder(HUGGINGFACE, tokenizer, info)
    assert isinstance(encoder, HuggingFaceEncoder)
    if not encoder.shows_spaces:
        raise UserError(
            "--sentences rules does not go with this tokenizer, which makes no difference between sentences with and "
            "without a space before them: use --sentences lines, or a tokenizer with the steps of RoBERTa's, XLM-R's "
            "or CamemBERT's"
        )


def _do_unit(job: Job, info: TokenizerInfo, options: ShardOptions, backend: str, unit: Unit) -> tuple[int, Record]:
    return unit.index, job.do(UNITS, unit.index, partial(shard_unit, job.data, info, options, backend, unit))


def _do_merge(job: Job, units: int, documents: int, index: int) -> Record:
    return job.do("drops", index, lambda scratch: dedup.merge(job.folder, scratch, units, documents, index))


def _do_final(
    job: Job, info: TokenizerInfo, kind: str, documents: int, item: tuple[Unit, UnitResult]
) -> tuple[int, Record]:
    unit, result = item
    record = job.do("final", unit.index, partial(thin_unit, job.folder, info, kind, documents, unit, result))
    for shard in (shard for shards in result.shards.values() for shard in shards):
        (job.folder / "staged" / shard.file).unlink(missing_ok=True)  # so that no unit is on disk twice for long
    return unit.index, record


def _check_train_split(manifest: Manifest, options: ShardOptions) -> None:
    if manifest.documents(TRAIN_SPLIT):
        return
    if manifest.documents(VALIDATION_SPLIT):
        raise UserError(
            f"all {manifest.documents(VALIDATION_SPLIT)} documents are held out for validation: "
            f"lower --validation_fraction {options.validation_fraction} or add documents"
        )
    rejected: Counter[str] = sum((Counter(entry.rejected) for entry in manifest.inputs), Counter())
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(rejected.items()))
    raise UserError(
        f"the corpus is empty: no document of {len(manifest.inputs)} input file(s) was kept"
        + (f"; rejected: {reasons}; see --documents, --min_characters, --max_characters, --filter" if reasons else "")
    )
