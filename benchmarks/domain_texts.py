"""The texts of `benchmarks.domain`: the domain prepared with both tokenizers, held-out passages, and the task."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from benchmarks.evening_texts import texts_of, write_table
from benchmarks.overlap import near_copies
from benchmarks.studies import execute
from ds_roberta.data.manifest import TOKENIZER_FOLDER, TRAIN_SPLIT, VALIDATION_SPLIT
from ds_roberta.data.shards import Corpus
from ds_roberta.data.tokenizer_files import training_tokenizer
from ds_roberta.errors import UserError
from ds_roberta.files import read_json
from preprocessing.prepared.stored_documents import Decoder, StoredDocuments
from preprocessing.tokens.sentence_splitting import sentence_bytes
from preprocessing.units import split_of

OWN, NEW = "own", "new"
"""The tokenizers, and the folders with the domain's text prepared with them."""
TASK = "task"
PASSAGES = "passages.jsonl"
HELD_OUT = 0.1
"""Of the domain's documents."""
TASK_VALIDATION = 1 / 3
"""Of the held-out documents: for the task's validation split, the others for its training split."""
SHORTEST_WORDS = 15
LARGEST = {TRAIN_SPLIT: 500, VALIDATION_SPLIT: 200}
"""The most passages of a source in the task."""
SMALLEST = 10
"""Of a source's passages in each split of the task; a source with fewer is left out."""


class Passage(NamedTuple):
    text: str
    source: str
    split: str


def is_training_text(text: str, _: Mapping[str, Any]) -> bool:
    """Whether `preprocess shard` puts a document into the training split; a `--filter` for the new tokenizer."""
    return split_of(sentence_bytes(text, "lines"), HELD_OUT) == TRAIN_SPLIT


def prepare(options: argparse.Namespace, folder: Path, lock: int) -> dict[str, Any]:
    """Write the domain's text with both tokenizers, the passages and the task; return how much there is of each."""
    vocab_size = Corpus.open(options.general_data_dir).manifest.tokenizer.vocab_size
    reading = ["--input", *options.input]
    if options.source_column:
        reading += ["--source_column", options.source_column]
    tokenizer = folder / "tokenizer"
    words = [*reading, "--output", str(tokenizer), "--vocab_size", str(vocab_size)]
    _preprocess("train-tokenizer", [*words, "--filter", f"{__name__}:{is_training_text.__name__}"], lock)
    for name, source in ((OWN, options.model), (NEW, tokenizer)):
        words = [*reading, "--tokenizer", str(source), "--output", str(folder / name)]
        _preprocess("shard", [*words, "--validation_fraction", str(HELD_OUT), "--dedup", "near"], lock)
    domain, general = Corpus.open(folder / NEW), Corpus.open(options.general_data_dir)
    fits = fitting([folder / OWN / TOKENIZER_FOLDER, folder / NEW / TOKENIZER_FOLDER], options.max_seq_length)
    held_out = passages_of(domain, fits)
    chosen, left_out = {}, {}
    for kind, corpus, passages in (("domain", domain, held_out), ("general", general, passages_of(general, fits))):
        chosen[kind], left_out[kind] = without_copies(passages, texts_of(corpus, TRAIN_SPLIT), options.passages)
    rows = [{"text": each.text, "kind": kind} for kind, passages in chosen.items() for each in passages]
    write_table(folder / PASSAGES, rows)
    task, counts = task_of(held_out, texts_of(domain, TRAIN_SPLIT))
    for split in LARGEST:
        table = [{"text": each.text, "label": each.source} for each in task if each.split == split]
        write_table(folder / TASK / f"{split}.jsonl", table)
    splits = {name: Corpus.open(folder / name).manifest for name in (OWN, NEW)}
    model = read_json(options.model / "config.json")
    return {
        "model": {name: model[name] for name in ("num_hidden_layers", "hidden_size")},
        "vocab_size": {name: manifest.tokenizer.vocab_size for name, manifest in splits.items()},
        "tokens": {name: manifest.tokens(TRAIN_SPLIT) for name, manifest in splits.items()},
        "documents": {split: splits[NEW].documents(split) for split in (TRAIN_SPLIT, VALIDATION_SPLIT)},
        "passages": {kind: len(passages) for kind, passages in chosen.items()},
        "near_copies": left_out,
        "task": counts,
    }


def _preprocess(name: str, words: Sequence[str], lock: int) -> None:
    execute([sys.executable, "-m", "preprocessing.cli", name, *words], lock)


def fitting(tokenizers: Sequence[Path], max_seq_length: int) -> Callable[[str], bool]:
    """Whether a text has enough words, and few enough tokens by each of the tokenizers, with `<s>` and `</s>`."""
    found = [training_tokenizer(folder) for folder in tokenizers]

    def fits(text: str) -> bool:
        if len(text.split()) < SHORTEST_WORDS:
            return False
        return all(len(each.encode(text, add_special_tokens=False)) <= max_seq_length - 2 for each in found)

    return fits


def passages_of(corpus: Corpus, fits: Callable[[str], bool]) -> list[Passage]:
    """The different lines of held-out documents that fit, in the order of the documents.

    A document belongs to one split of the task, by the hash of its text. A line that several documents have belongs to
    the first of them.
    """
    documents, decoder = StoredDocuments(corpus, VALIDATION_SPLIT), Decoder(corpus)
    found: dict[str, Passage] = {}
    for number in range(len(documents)):
        document = documents.document(number)
        lines = decoder.lines(documents.sentences(document))
        source = documents.split.shards[document.shard].source
        split = split_of("\n".join(lines), HELD_OUT * TASK_VALIDATION)
        for line in map(str.strip, lines):
            if line not in found and fits(line):
                found[line] = Passage(line, source, split)
    return list(found.values())


def first_by_hash(passages: Iterable[Passage], number: int) -> list[Passage]:
    """A sample that depends only on the texts, and not on the hash by which documents are held out."""
    return sorted(passages, key=lambda each: xxhash.xxh3_64_intdigest(each.text.encode(), seed=1))[:number]


def without_copies(
    passages: Sequence[Passage], training_texts: Iterable[str], number: int
) -> tuple[list[Passage], int]:
    """So many passages that are no near copies of something in the training texts, and how many were left out."""
    candidates = first_by_hash(passages, 2 * number)
    copies = near_copies([each.text for each in candidates], training_texts)
    apart = [each for each, is_copy in zip(candidates, copies, strict=True) if not is_copy]
    chosen = apart[:number]
    looked_at = candidates.index(chosen[-1]) + 1 if len(chosen) == number else len(candidates)
    return chosen, looked_at - len(chosen)


def task_of(
    passages: Sequence[Passage], training_texts: Iterable[str]
) -> tuple[list[Passage], dict[str, dict[str, int]]]:
    """The passages of the task, and the counts by source: of each split, and of the near copies that are left out.

    Left out are near copies of something in the training texts and, in the validation split, in the training split.

    Raises:
        UserError: fewer than two sources have enough passages.
    """
    chosen = [
        each
        for source in sorted({each.source for each in passages} - {""})
        for split, largest in LARGEST.items()
        for each in first_by_hash((one for one in passages if (one.source, one.split) == (source, split)), largest)
    ]
    copies = near_copies([each.text for each in chosen], training_texts)
    kept = [each for each, is_copy in zip(chosen, copies, strict=True) if not is_copy]
    validation = [each for each in kept if each.split == VALIDATION_SPLIT]
    training = [each for each in kept if each.split == TRAIN_SPLIT]
    copies = near_copies([each.text for each in validation], (each.text for each in training))
    kept = [*training, *(each for each, is_copy in zip(validation, copies, strict=True) if not is_copy)]
    before, after = (Counter((each.source, each.split) for each in some) for some in (chosen, kept))
    counts = {
        source: {
            **{split: after[source, split] for split in LARGEST},
            "near copies": sum(before[source, split] - after[source, split] for split in LARGEST),
        }
        for source in sorted({each.source for each in chosen})
    }
    large = {source for source, each in counts.items() if is_large(each)}
    if len(large) < 2:
        raise UserError(
            f"the task needs two sources with {SMALLEST} held-out passages in each split, found {counts}: name the "
            "sources as NAME=PATH or by --source_column, or add documents"
        )
    return [each for each in kept if each.source in large], counts


def is_large(counts: Mapping[str, int]) -> bool:
    """Whether a source with so many passages, by split, is in the task."""
    return min(counts[split] for split in LARGEST) >= SMALLEST
