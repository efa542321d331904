"""Tracing global batches: the same sequences as the loader yields, and their documents."""

import json

import numpy as np
import pytest
import torch
from prepare import prepare_corpus

from ds_roberta.config import MaskingConfig, PackingConfig, Stage
from ds_roberta.data.loader import Collator, LoaderStage, TrainLoader
from ds_roberta.data.masking import training_masker
from ds_roberta.data.mixture import sample_order
from ds_roberta.data.order import SampleOrder
from ds_roberta.data.packing import build_index, open_index
from ds_roberta.data.shards import Corpus
from ds_roberta.data.stages import SkippedPlaces, make_stages
from ds_roberta.errors import UserError
from ds_roberta.inputs.pieces import Piece as ReadPiece
from preprocessing.cli import main
from preprocessing.prepared.stored_documents import Decoder, StoredDocuments
from preprocessing.prepared.trace import BatchTracer
from preprocessing.reading.documents import ReadOptions
from preprocessing.reading.readers import read_documents
from preprocessing.units import ShardOptions

LENGTH, SEED = 16, 9  # short, so that there are sequences for several lanes


@pytest.fixture(scope="module", params=[None, {"books": 2, "web": 0, "wiki": 1}], ids=["as it is", "weighted"])
def source_weights(request):
    return request.param


@pytest.fixture(scope="module")
def make_loader(sourced, source_weights):
    build_index(sourced, "train", PackingConfig(LENGTH))
    packed = open_index(sourced, "train", PackingConfig(LENGTH))
    tokenizer = sourced.manifest.tokenizer
    collator = Collator(packed, training_masker(MaskingConfig(), tokenizer, SEED), tokenizer, LENGTH)

    assert SampleOrder(len(packed), SEED).lanes > 1

    def make(batch, micro_batch, rank, world_size):
        order = sample_order(packed, source_weights, SEED)
        return TrainLoader([LoaderStage(Stage(0, LENGTH, batch), collator, order, micro_batch)], rank, world_size)

    return make


def tokens_of_loader(micro_batches):
    """Every filled row's ids with its labels put back, without the frame and padding."""
    found = []
    for micro_batch in micro_batches:
        ids = micro_batch.input_ids.clone()
        ids.view(-1)[micro_batch.masked_positions] = micro_batch.labels
        mask = micro_batch.attention_mask
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        rows = zip(ids[: micro_batch.sequences], mask[: micro_batch.sequences], strict=True)
        found += [row[keep][1:-1].tolist() for row, keep in rows]
    return found


def tokens_of_trace(corpus, traced):
    """The same from the documents that the trace names."""
    split = corpus.split("train")
    found = []
    for sequence in traced:
        ids = []
        for document in sequence.documents:
            assert split.shards[document.shard].file == document.file == sequence.file
            begin, end = split.document_offsets(document.shard)[document.row : document.row + 2]
            assert (document.start, document.end) == (begin, end)
            ids += split.values(document.shard)[max(begin, sequence.start) : min(end, sequence.end)].tolist()
        found.append(ids)
    return found


@pytest.mark.parametrize(("batch", "micro_batch", "world_size"), [(7, 3, 1), (64, 8, 2), (50, 7, 4), (3, 2, 5)])
@pytest.mark.parametrize("step", [1, 2, 5000])
def test_a_trace_is_what_the_loader_yields(sourced, source_weights, make_loader, batch, micro_batch, world_size, step):
    tracer = BatchTracer(sourced, PackingConfig(LENGTH), make_stages(LENGTH, batch), SEED, source_weights)
    for rank in range(world_size):
        expected = tokens_of_loader(make_loader(batch, micro_batch, rank, world_size).micro_batches(step - 1))
        traced = list(tracer.trace(step, tracer.places(step, rank, world_size)))
        assert tokens_of_trace(sourced, traced) == expected
        assert all(entry.documents for entry in traced)
        assert not source_weights or all(source_weights[entry.source] for entry in traced)
    whole = tracer.places(step)
    assert sorted(whole.tolist()) == list(range((step - 1) * batch, step * batch))


@pytest.mark.parametrize("skipped", [[], [SkippedPlaces(3, 16, 40, 77), SkippedPlaces(3, 24, 0, 20)]])
def test_a_trace_of_stages_is_what_the_loader_yields(corpus, skipped):
    stages = make_stages(24, 20, "0:16,3:24", "0:10,4:20")
    tokenizer, data = corpus.manifest.tokenizer, {}
    for length in (16, 24):
        build_index(corpus, "train", PackingConfig(length))
        packed = open_index(corpus, "train", PackingConfig(length))
        masker = training_masker(MaskingConfig(), tokenizer, SEED)
        data[length] = Collator(packed, masker, tokenizer, length), SampleOrder(len(packed), SEED)
    tracer = BatchTracer(corpus, PackingConfig(24), stages, SEED, skipped=skipped)
    for rank in range(3):
        loader = TrainLoader([LoaderStage(stage, *data[stage.max_seq_length], 4) for stage in stages], rank, 3)
        for step in (1, 3, 4, 5, 6, 1000):
            expected = tokens_of_loader(loader.micro_batches(step - 1, skipped))
            assert tokens_of_trace(corpus, tracer.trace(step, tracer.places(step, rank, 3))) == expected


def test_the_command_knows_schedules_and_what_a_run_left_out(prepared, tmp_path, capsys):
    entry = {"global_step": 1, "max_seq_length": 64, "first_place": 0, "end_place": 7}
    (tmp_path / "train_state.json").write_text(json.dumps({"skipped_places": [entry]}))
    command = f"trace {prepared} --step 1 3 --train_batch_size 6 --max_seq_length 64 --json --checkpoint {tmp_path}"
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--max_seq_length_schedule", "0:32,1:64", "--train_batch_size_schedule", "0:2,2:6"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(row["step"], row["max_seq_length"], row["place"]) for row in rows} == {
        *((1, 32, place) for place in (0, 1)),
        *((3, 64, place) for place in range(2 + 7, 8 + 7)),
    }


def test_a_late_step_costs_no_more_than_the_first(corpus):
    tracer = BatchTracer(corpus, PackingConfig(LENGTH), make_stages(LENGTH, 8), SEED)
    (entry, *_) = tracer.trace(10**12, tracer.places(10**12))
    assert entry.place // 8 == 10**12 - 1
    assert entry.epoch > 10**8


@pytest.mark.parametrize(("step", "batch", "seed"), [(0, 4, 0), (-1, 4, 0), (1, 0, 0), (1, 4, -1)])
def test_values_out_of_range_are_user_errors(corpus, step, batch, seed):
    with pytest.raises(UserError, match=r"--(step|train_batch_size|seed) must"):
        BatchTracer(corpus, PackingConfig(LENGTH), make_stages(LENGTH, batch), seed).places(step)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer_folder):
    """A data folder made from one large file, which is cut into units, and small ones, which are combined."""
    folder = tmp_path_factory.mktemp("prepared")
    counts = {"large.txt": 150, "small-a.txt": 3, "small-b.txt": 4, "small-c.txt": 2}
    for name, count in counts.items():
        text = "\n\n".join(f"Document {i} of {name}.\nIt says {'ka to mi ' * (i % 40)}" for i in range(count))
        (folder / name).write_text(text)
    options = ShardOptions(validation_fraction=0.2, unit_bytes=4000)
    files = [str(folder / name) for name in counts]
    prepare_corpus(files, tokenizer_folder, folder / "data", options, workers=1)
    return folder / "data"


def test_every_document_is_traced_to_its_piece(prepared, capsys):
    command = f"trace {prepared} --step 1 --train_batch_size 400 --max_seq_length 64 --json"
    with pytest.raises(SystemExit, match="0"):
        main(command.split())
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    corpus = Corpus.open(prepared)
    assert {row["document"] for row in rows} == set(range(corpus.manifest.documents("train")))
    assert len({row["input"] for row in rows}) == 4
    assert len({(row["input"], row["input_start"]) for row in rows}) > 6
    split = corpus.split("train")
    decoder, documents = Decoder(corpus), StoredDocuments(corpus, "train")
    for row in rows:
        piece = ReadPiece(row["input"], row["input_start"], row["input_end"])
        document = documents.document(row["document"])
        assert (document.row, document.file) == (row["row"], row["shard"])
        text = "\n".join(decoder.lines(documents.sentences(document)))
        assert text in [each.text.rstrip() for each in read_documents(piece, ReadOptions())]
        assert 0 <= row["tokens_start"] < row["tokens_end"] < document.end - document.start + 1
    assert sum(len(split.document_offsets(shard)) - 1 for shard in range(len(split.shards))) == len(documents)


def test_columns_and_objects_say_the_same(prepared, capsys):
    command = f"trace {prepared} --step 2 3 --train_batch_size 5 --max_seq_length 64 --seed 4 --rank 1/2"
    for extra in ("", " --json"):
        with pytest.raises(SystemExit, match="0"):
            main((command + extra).split())
    lines = capsys.readouterr().out.splitlines()
    header, *table = [line.split("\t") for line in lines if not line.startswith("{")]
    objects = [json.loads(line) for line in lines if line.startswith("{")]
    assert [dict(zip(header, map(str, row), strict=True)) for row in table] == [
        {key: "-" if value is None else str(value) for key, value in entry.items()} for entry in objects
    ]
    assert {entry["step"] for entry in objects} == {2, 3}
    assert len({(entry["step"], entry["place"]) for entry in objects}) == 6  # 5 of 2 processes, the second has 3


@pytest.mark.parametrize("rank", ["2/2", "-1/2", "1", "a/b", "0/0", "1/2/3"])
def test_a_wrong_rank_is_one_line(prepared, capsys, rank):
    command = f"trace {prepared} --step 1 --train_batch_size 4 --max_seq_length 64 --rank={rank}"
    with pytest.raises(SystemExit, match="2"):
        main(command.split())
    assert f"--rank {rank!r}" in capsys.readouterr().err


def test_slices_are_where_gather_reads(corpus):
    build_index(corpus, "train", PackingConfig(LENGTH))
    packed, split = open_index(corpus, "train", PackingConfig(LENGTH)), corpus.split("train")
    sequences = np.arange(0, len(packed), 37)
    out = np.zeros((len(sequences), LENGTH), np.int64)
    lengths = packed.lengths(sequences)
    packed.gather(sequences, out)
    (segments,) = packed.segments(sequences)
    rows = zip(out, lengths, *segments, strict=True)
    for row, length, shard, start, end in rows:
        assert row[1 : 1 + length].tolist() == split.values(int(shard))[start:end].tolist()


def test_documents_are_found_by_any_of_their_tokens(corpus):
    documents = StoredDocuments(corpus, "train")
    document = documents.document(405)
    for start, end in ((document.start, document.end), (document.start, document.start + 1), (document.end - 1,) * 2):
        assert list(documents.overlapping(document.shard, start, max(end, start + 1))) == [document]
    neighbours = documents.overlapping(document.shard, document.start - 1, document.end + 1)
    assert [each.number for each in neighbours] == [404, 405, 406]
