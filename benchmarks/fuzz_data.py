"""Readers of prepared data: damage is found by `verify`, and no reader gives what the tokenizer does not know."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from benchmarks.fuzz_folders import files_of, folders, tokenizer_files
from benchmarks.fuzz_inputs import Files
from benchmarks.fuzz_rows import Reader, SilentLoss, attempt_all
from ds_roberta.config import PackingConfig
from ds_roberta.data.manifest import MANIFEST_NAME, TOKENIZER_FOLDER, Manifest, ShardInfo
from ds_roberta.data.packing import INDEX_FOLDER, build_index, open_index
from ds_roberta.data.shards import Corpus, write_shard
from ds_roberta.data.tokenizer import TokenizerInfo
from ds_roberta.errors import UserError
from ds_roberta.files import load_json
from preprocessing.prepared.stored_documents import Decoder, StoredDocuments
from preprocessing.prepared.verify import verify

_PACKINGS = PackingConfig(16), PackingConfig(16, "segment-pair")


@cache
def data_files() -> Files:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        for name, content in tokenizer_files().items():
            (folder / TOKENIZER_FOLDER).mkdir(parents=True, exist_ok=True)
            (folder / TOKENIZER_FOLDER / name).write_bytes(content)
        tokenizer = TokenizerInfo.read(folder / TOKENIZER_FOLDER)
        documents = [np.append(np.arange(5, 5 + size), tokenizer.eos_token_id) for size in (3, 40, 9)]
        ends = [np.array([2, len(document) - 1]) for document in documents]
        shards: dict[str, tuple[ShardInfo, ...]] = {
            split: (write_shard(folder, split, 0, documents, ends, tokenizer.vocab_size),)
            for split in ("train", "validation")
        }
        Manifest(tokenizer, {"text_column": "text", "packing_version": 3}, (), shards).write(folder)
        for packing in _PACKINGS:
            build_index(Corpus.open(folder), "train", packing)
        return files_of(folder)


def _read_data(folder: Path) -> None:
    def packed() -> None:
        corpus = Corpus.open(folder)
        for packing in _PACKINGS:
            build_index(corpus, "train", packing)
            found = open_index(corpus, "train", packing)
            sequences = np.arange(min(len(found), 8))
            rows = np.zeros((len(sequences), packing.max_seq_length), dtype=np.int64)
            assert found.lengths(sequences).max(initial=0) <= packing.max_seq_length - 2
            found.gather(sequences, rows)
            if rows.max(initial=0) >= corpus.manifest.tokenizer.vocab_size:
                raise SilentLoss(f"the id {rows.max()} is read")

    def shown() -> None:
        corpus = Corpus.open(folder)
        documents, decoder = StoredDocuments(corpus, "train"), Decoder(corpus)
        for number in range(min(len(documents), 4)):
            decoder.text(documents.sentences(documents.document(number)))

    def verified() -> None:
        if problems := verify(folder):
            raise UserError(problems[0])
        if changed := _changed(folder):
            raise SilentLoss(f"verify finds nothing, though {', '.join(sorted(changed))} changed")

    attempt_all(packed, shown, verified)


def _changed(folder: Path) -> set[str]:
    """The files in which `verify` should have found damage; an index is a cache, and of a manifest the values count."""
    first, now = ({name: content for name, content in files.items() if not name.startswith(INDEX_FOLDER)}
                  for files in (data_files(), files_of(folder)))  # fmt: skip
    changed = {name for name in first.keys() | now.keys() if first.get(name) != now.get(name)}
    if load_json(now[MANIFEST_NAME]) == load_json(first[MANIFEST_NAME]):
        changed.discard(MANIFEST_NAME)
    return changed


def data_readers() -> dict[str, Reader]:
    """The reader of this module, by the name of what it reads."""
    prefixes = ("", "train/shard", INDEX_FOLDER)
    return {"data folders": Reader(st.one_of(*(folders(data_files, prefix) for prefix in prefixes)), _read_data)}
