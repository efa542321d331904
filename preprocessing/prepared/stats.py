"""`preprocess stats`: count what is in prepared data, from the shards only.

The size of the text is the sum of the bytes that the ids stand for. Byte-level BPE loses nothing; of a Unigram's text
this is the size after its normalization, with a space before every word and without unknown characters.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders

from ds_roberta.config import EVAL_SEQUENCES, MaskingConfig, PackingConfig
from ds_roberta.data import unigram
from ds_roberta.data.manifest import TOKENIZER_FOLDER, TRAIN_SPLIT, VALIDATION_SPLIT, ShardInfo
from ds_roberta.data.mixture import shown_source
from ds_roberta.data.packing import pack_shard, pack_split, packed_tokens
from ds_roberta.data.shards import Corpus, Split
from ds_roberta.data.tokenizer import token_bytes as bytes_of_ids
from ds_roberta.errors import UserError
from ds_roberta.files import atomic_path, check_output_file, errors_of_the_disk
from ds_roberta.options import add_options
from ds_roberta.progress import byte_bar

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
_BLOCK_TOKENS = 1 << 20
_NAMED_IDS = 10
_NAMED_INPUTS = 20


@dataclass
class Amount:
    """How much is in a split or an input. `tokens` includes each document's separator, as in the manifest."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


@dataclass
class Packed:
    """How full the sequences of one length are; `tokens` are those that are not padding."""

    max_seq_length: int
    sequences: int = 0
    tokens: int = 0


@dataclass
class SourceStats:
    """What is in one source of a split, or in all."""

    amount: Amount
    packed: list[Packed]


@dataclass
class SplitStats(SourceStats):
    """What is in one split.

    Attributes:
        document_lengths: the number of documents by their number of tokens, without the separator.
        sources: by name, for the documents that have one.
    """

    sentences: int = 0
    document_lengths: Counter[int] = field(default_factory=Counter)
    sources: dict[str, SourceStats] = field(default_factory=dict)

    def percentiles(self) -> dict[int, int]:
        """Return the length that this percentage of the documents does not exceed."""
        lengths, counts = np.array(sorted(self.document_lengths.items())).T
        totals = np.cumsum(counts)
        ranks = np.ceil(np.array(PERCENTILES) / 100 * totals[-1]).clip(min=1)
        return dict(zip(PERCENTILES, lengths[np.searchsorted(totals, ranks)].tolist(), strict=True))


@dataclass
class Stats:
    """What is in a data folder.

    Attributes:
        inputs: by path, for the inputs that the manifest attributes documents to.
        id_counts: how often each id occurs, special ids included: (vocab_size,) int64.
        lines: by sequence length, the losses of `CountModel.losses` on the sample of held-out sequences of a run with
            default masks; none without held-out sequences.
    """

    splits: dict[str, SplitStats] = field(default_factory=dict)
    inputs: dict[str, Amount] = field(default_factory=dict)
    lines: dict[int, dict[str, float]] = field(default_factory=dict)
    id_counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def corpus_stats(corpus: Corpus, packings: Sequence[PackingConfig]) -> Stats:
    """Read all shards of a data folder, one after the other."""
    manifest = corpus.manifest
    stats = Stats(id_counts=np.zeros(manifest.tokenizer.vocab_size, np.int64))
    bytes_of = token_bytes(corpus)
    with byte_bar(sum(info.bytes for infos in manifest.splits.values() for info in infos), "reading") as bar:
        for name in filter(manifest.documents, manifest.splits):
            split = corpus.split(name)
            found = SplitStats(Amount(), _packed(packings))
            for shard, info in enumerate(split.shards):
                _add_shard(stats, found, split, shard, packings, bytes_of)
                bar.update(info.bytes)
            stats.splits[name] = found
    stats.lines = _lines(corpus, packings)
    return stats


def _lines(corpus: Corpus, packings: Sequence[PackingConfig]) -> dict[int, dict[str, float]]:
    if not all(map(corpus.manifest.documents, (TRAIN_SPLIT, VALIDATION_SPLIT))):
        return {}
    # They need torch, which would slow the start of every other command.
    from ds_roberta.data.count_models import CountModel
    from ds_roberta.data.loader import Collator
    from ds_roberta.data.masking import evaluation_masker

    tokenizer, model = corpus.manifest.tokenizer, CountModel.of(corpus)
    masker, lines = evaluation_masker(MaskingConfig(), tokenizer), {}
    for packing in packings:
        packed = pack_split(corpus, VALIDATION_SPLIT, packing)
        if len(packed):
            collator = Collator(packed, masker, tokenizer, packing.max_seq_length)
            lines[packing.max_seq_length] = model.losses(collator, EVAL_SEQUENCES)
    return lines


def token_bytes(corpus: Corpus) -> np.ndarray:
    """Return the number of bytes of text that each id stands for, 0 for special ids: (vocab_size,) int64."""
    info, tokenizer = corpus.manifest.tokenizer, _tokenizer(corpus)
    of_model = bytes_of_ids(corpus.folder / TOKENIZER_FOLDER)
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    sizes = np.zeros(info.vocab_size, np.int64)
    for token, id_ in tokenizer.get_vocab().items():
        sizes[id_] = len(token.encode()) if token in added else len(of_model[id_])
    sizes[list(info.special_ids)] = 0
    return sizes


def _tokenizer(corpus: Corpus) -> Tokenizer:
    return Tokenizer.from_file(str(corpus.folder / TOKENIZER_FOLDER / "tokenizer.json"))


def _packed(packings: Sequence[PackingConfig]) -> list[Packed]:
    return [Packed(packing.max_seq_length) for packing in packings]


def _add_shard(
    stats: Stats, found: SplitStats, split: Split, shard: int, packings: Sequence[PackingConfig], bytes_of: np.ndarray
) -> None:
    info, values, offsets = split.shards[shard], split.values(shard), split.document_offsets(shard)
    for block in range(0, len(values), _BLOCK_TOKENS):
        ids = split.checked(shard, values[block : block + _BLOCK_TOKENS])
        stats.id_counts += np.bincount(ids, minlength=len(stats.id_counts))
    of_shard: list[SourceStats] = [found]
    if info.source:
        of_shard.append(found.sources.setdefault(info.source, SourceStats(Amount(), _packed(packings))))
    for path, first, last in _origins(info):
        start, end = offsets[[first, last]].tolist()
        blocks = range(start, end, _BLOCK_TOKENS)
        text_bytes = sum(int(bytes_of[values[at : min(at + _BLOCK_TOKENS, end)]].sum()) for at in blocks)
        amounts = [part.amount for part in of_shard]
        if path is not None:
            amounts.append(stats.inputs.setdefault(path, Amount()))
        for amount in amounts:
            amount.documents += last - first
            amount.tokens += end - start
            amount.text_bytes += text_bytes
    lengths, counts = np.unique(np.diff(offsets) - 1, return_counts=True)
    found.document_lengths.update(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))
    found.sentences += len(split.sentence_bounds(shard)[0])
    for number, packing in enumerate(packings):
        slices = pack_shard(split, shard, packing)
        tokens = packed_tokens(slices, packing)
        for part in of_shard:
            part.packed[number].sequences += len(slices)
            part.packed[number].tokens += tokens


def _origins(info: ShardInfo) -> Iterator[tuple[str | None, int, int]]:
    """Yield the inputs of a shard's documents in order: path, first row, row after the last."""
    row = 0
    for piece in info.pieces:
        yield piece.path, row, row + piece.documents
        row += piece.documents
    if not info.pieces:
        yield None, 0, info.documents


def as_json(stats: Stats, corpus: Corpus) -> dict[str, Any]:
    """Return the statistics as JSON values."""

    def amount(value: Amount) -> dict[str, Any]:
        return {**asdict(value), "bytes_per_token": value.text_bytes / max(value.tokens, 1)}

    def packing(packed: Sequence[Packed]) -> list[dict[str, Any]]:
        return [
            {**asdict(each), "efficiency": each.tokens / max(each.sequences * each.max_seq_length, 1)}
            for each in packed
        ]

    splits = {
        name: {
            **amount(split.amount),
            "sentences": split.sentences,
            "document_length_percentiles": split.percentiles(),
            "packing": packing(split.packed),
            "sources": {
                source: {**amount(found.amount), "packing": packing(found.packed)}
                for source, found in sorted(split.sources.items())
            },
        }
        for name, split in stats.splits.items()
    }
    return {
        "splits": splits,
        "lines": stats.lines,
        "inputs": {path: amount(value) for path, value in stats.inputs.items()},
        "vocabulary": vocabulary(stats, corpus),
    }


def vocabulary(stats: Stats, corpus: Corpus) -> dict[str, Any]:
    """Return how many of the ordinary (not special) ids occur, and which occur most and least often."""
    tokenizer = _tokenizer(corpus)
    of_unigram = unigram.is_model(tokenizer)
    decoder = decoders.Replace(unigram.WORD_START, " ") if of_unigram else decoders.ByteLevel()
    tokens = {id_: token for token, id_ in tokenizer.get_vocab().items()}
    ordinary = np.setdiff1d(list(tokens), corpus.manifest.tokenizer.special_ids)
    used = ordinary[stats.id_counts[ordinary] > 0]
    by_count = used[np.argsort(-stats.id_counts[used], kind="stable")].tolist()

    def named(ids: list[int]) -> list[dict[str, Any]]:
        return [{"id": id_, "text": decoder.decode([tokens[id_]]), "count": int(stats.id_counts[id_])} for id_ in ids]

    return {
        "ids": len(ordinary),
        "used": len(used),
        "unknown": int(stats.id_counts[tokenizer.token_to_id(unigram.UNKNOWN)]) if of_unigram else 0,
        "coverage": len(used) / len(ordinary),
        "most_used": named(by_count[:_NAMED_IDS]),
        "least_used": named(by_count[: -_NAMED_IDS - 1 : -1]),
    }


def as_text(content: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a report on `content`, which `as_json` made."""
    for name, split in content["splits"].items():
        yield (
            f"{name:<12}{split['documents']:,} documents, {split['sentences']:,} sentences, {split['tokens']:,} "
            f"tokens, {split['text_bytes']:,} bytes of text, {split['bytes_per_token']:.2f} bytes/token"
        )
        lengths = ", ".join(f"{share}%: {length:,}" for share, length in split["document_length_percentiles"].items())
        yield f"  tokens per document, at most  {lengths}"
        for packed in split["packing"]:
            yield (
                f"  --max_seq_length {packed['max_seq_length']:<6}{packed['sequences']:,} sequences, "
                f"{packed['efficiency']:.2%} filled"
            )
        for source, amount in split["sources"].items():
            sequences = ", ".join(f"{each['sequences']:,} of {each['max_seq_length']}" for each in amount["packing"])
            yield (
                f"  source {shown_source(source)}: {amount['documents']:,} documents, {amount['tokens']:,} tokens"
                + (f", sequences {sequences}" if sequences else "")
            )
    if content["lines"]:
        yield "lines       held-out loss by counting alone, in nats per masked token"
    for length, lines in content["lines"].items():
        yield (
            f"  --max_seq_length {length:<6}{lines['unigram_loss']:.4f} from the frequencies of tokens, "
            f"{lines['neighbour_loss']:.4f} from counts of neighbours"
        )
    inputs = sorted(content["inputs"].items(), key=lambda entry: -entry[1]["tokens"])
    if inputs:
        yield f"inputs      {len(inputs)} with documents" + (", the largest" if len(inputs) > _NAMED_INPUTS else "")
    for path, amount in inputs[:_NAMED_INPUTS]:
        yield (
            f"  {path}: {amount['documents']:,} documents, {amount['tokens']:,} tokens, "
            f"{amount['bytes_per_token']:.2f} bytes/token"
        )
    words = content["vocabulary"]
    yield f"vocabulary  {words['used']:,} of {words['ids']:,} ordinary ids used ({words['coverage']:.2%})"
    if words["unknown"]:
        yield f"  unknown     {words['unknown']:,} tokens are <unk>: characters that the tokenizer does not know"
    for kind in ("most_used", "least_used"):
        named = ", ".join(f"{entry['text']!r} {entry['count']:,}" for entry in words[kind])
        yield f"  {kind.replace('_', ' '):<12}{named}"


def check_plot(path: Path) -> None:
    """Raise `UserError` if matplotlib is not installed, does not know the format, or cannot write there."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'ds_roberta[plot]'") from error
    check_output_file("--plot", path)
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in kinds:
        raise UserError(f"--plot {str(path)!r} is no image that matplotlib writes: choose one of .{', .'.join(kinds)}")


def plot(stats: Stats, path: Path) -> None:
    """Plot the lengths of documents and the frequencies of ids, and save the image; see `check_plot`.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    documents, ids = figure.subplots(1, 2)
    for name, split in stats.splits.items():
        lengths, counts = np.array(sorted(split.document_lengths.items())).T
        bins = np.geomspace(1, max(lengths[-1], 2) + 1, 60)
        documents.hist(lengths.clip(min=1), bins, weights=counts / counts.sum(), histtype="step", label=name)
    documents.set(xscale="log", xlabel="tokens per document", ylabel="share of documents", title="Lengths")
    documents.legend()
    frequencies = np.sort(stats.id_counts[stats.id_counts > 0])[::-1]
    ids.plot(np.arange(1, len(frequencies) + 1), frequencies)
    ids.set(xscale="log", yscale="log", xlabel="rank of the id", ylabel="occurrences", title="Vocabulary")
    with errors_of_the_disk(path, "the plot "), atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:] or None)


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `stats` to the command line."""
    parser = commands.add_parser("stats", help="what is in prepared data: tokens, lengths, inputs, vocabulary, packing")
    parser.add_argument("data_dir", type=Path, metavar="DIR", help="a folder that 'preprocess shard' made")
    parser.add_argument(
        "--max_seq_length", type=int, nargs="+", default=[128, 512], help="lengths to pack for (default: 128 512)"
    )
    add_options(parser, PackingConfig, only=("packing",))
    parser.add_argument("--json", action="store_true", help="print JSON, with all inputs")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also write an image (needs matplotlib)")
    parser.set_defaults(run=_stats)


def _stats(arguments: argparse.Namespace) -> None:
    if arguments.plot:
        check_plot(arguments.plot)
    corpus = Corpus.open(arguments.data_dir)
    packings = [PackingConfig(length, arguments.packing) for length in arguments.max_seq_length]
    stats = corpus_stats(corpus, packings)
    if arguments.plot:
        plot(stats, arguments.plot)
    content = as_json(stats, corpus)
    print(json.dumps(content, indent=2, ensure_ascii=False) if arguments.json else "\n".join(as_text(content)))
