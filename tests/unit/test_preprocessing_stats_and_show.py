"""What `preprocess show` and `preprocess stats` say about prepared data."""

import json
import sys
from collections import Counter

import numpy as np
import pytest
from prepare import prepare_corpus
from tokenizers import Tokenizer

from ds_roberta.config import MaskingConfig, PackingConfig
from ds_roberta.data.count_models import CountModel
from ds_roberta.data.loader import Collator
from ds_roberta.data.masking import evaluation_masker
from ds_roberta.data.packing import build_index, open_index
from ds_roberta.data.shards import Corpus
from ds_roberta.errors import UserError
from preprocessing.cli import main
from preprocessing.prepared import stats
from preprocessing.prepared.show import document_numbers
from preprocessing.prepared.stats import corpus_stats
from preprocessing.prepared.stored_documents import Decoder, StoredDocuments
from preprocessing.units import ShardOptions

TEXTS = [
    f"Number {i}: ka tomi </s> renGrüße 日本語.\n{'vor li shen ' * (i * 7 % 23)}.\n  indented 🙂" for i in range(60)
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer_folder):
    """The data folder of TEXTS, in several shards, and the bytes of its text."""
    folder = tmp_path_factory.mktemp("looks")
    (folder / "a.txt").write_text("\n\n".join(TEXTS[:50]), encoding="utf-8")
    (folder / "b.txt").write_text("\n\n".join(TEXTS[50:]), encoding="utf-8")
    files = [str(folder / name) for name in ("a.txt", "b.txt")]
    options = ShardOptions(validation_fraction=0.2, unit_bytes=4000)
    _, totals = prepare_corpus(files, tokenizer_folder, folder / "data", options, workers=1)
    return folder / "data", totals.text_bytes


def run(line):
    with pytest.raises(SystemExit) as exit_:
        main(line.split())
    return exit_.value.code


def test_documents_are_decoded_as_they_were(prepared):
    corpus = Corpus.open(prepared[0])
    decoder, found = Decoder(corpus), Counter()
    for split in ("train", "validation"):
        documents = StoredDocuments(corpus, split)
        assert len(documents) == corpus.manifest.documents(split) > 5
        for number in range(len(documents)):
            document = documents.document(number)
            assert document.number == number
            found["\n".join(decoder.lines(documents.sentences(document)))] += 1
    assert found == Counter(TEXTS)


def test_show_prints_place_source_and_numbered_sentences(prepared, capsys):
    assert run(f"show {prepared[0]} --doc -1 --ids") == 0
    head, shard, source, *lines = capsys.readouterr().out.splitlines()
    last = Corpus.open(prepared[0]).manifest.documents("train") - 1
    assert head.startswith(f"document {last} of train: ")
    assert "shard-" in shard
    assert source.split()[1].rstrip(",").endswith("b.txt")
    assert [line[:7] for line in lines[::2]] == ["    1  ", "    2  ", "    3  "]
    assert lines[4].endswith("  indented 🙂")
    ids = [list(map(int, line.split())) for line in lines[1::2]]
    expected = Tokenizer.from_file(str(prepared[0] / "tokenizer/tokenizer.json"))
    assert "".join(expected.decode(line) for line in ids).endswith(" indented 🙂")
    assert head.endswith(f": {sum(map(len, ids))} tokens, 3 sentences")


def test_show_takes_ranges_and_splits(prepared, capsys):
    assert run(f"show {prepared[0]} --doc 2:5 --split validation") == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("document")]
    assert [head.split(":")[0] for head in heads] == [f"document {number} of validation" for number in (2, 3, 4)]


@pytest.mark.parametrize(
    ("text", "numbers"), [("3", [3]), ("-1", [-1]), ("2:4", [2, 3]), ("-2:", [8, 9]), (":2", [0, 1]), ("8:99", [8, 9])]
)
def test_numbers_and_ranges(text, numbers):
    assert list(document_numbers(text, 10)) == numbers


@pytest.mark.parametrize("text", ["", "a", "1:2:3", "5:2", "10:", "1.5"])
def test_what_is_not_a_number_is_a_user_error(text):
    with pytest.raises(UserError, match=r"--doc '.*' (is not a|contains no) document"):
        document_numbers(text, 10)


def test_a_missing_document_or_split_is_a_user_error(prepared, capsys):
    assert run(f"show {prepared[0]} --doc 1000") == 2
    assert "no document 1000 in split 'train'" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"no split 'test' in .* it has train, validation"):
        StoredDocuments(Corpus.open(prepared[0]), "test")


def test_stats_count_what_is_there(prepared, capsys):
    folder, text_bytes = prepared
    assert run(f"stats {folder} --json --max_seq_length 16 64") == 0
    found = json.loads(capsys.readouterr().out)
    corpus = Corpus.open(folder)
    assert sum(split["text_bytes"] for split in found["splits"].values()) == text_bytes
    ids = []
    for name, split in found["splits"].items():
        shards = corpus.split(name)
        ids += [id_ for shard in range(len(shards.shards)) for id_ in shards.values(shard).tolist()]
        lengths = np.concatenate([np.diff(shards.document_offsets(shard)) - 1 for shard in range(len(shards.shards))])
        assert (split["documents"], split["tokens"]) == (len(lengths), lengths.sum() + len(lengths))
        assert split["sentences"] == 3 * len(lengths)
        for share, length in split["document_length_percentiles"].items():
            assert length == np.percentile(lengths, float(share), method="inverted_cdf")
        for packed in split["packing"]:
            packing = PackingConfig(packed["max_seq_length"])
            build_index(corpus, name, packing)
            index = open_index(corpus, name, packing)
            tokens = index.lengths(np.arange(len(index))).sum() + 2 * len(index)
            assert packed["sequences"] == len(index)
            assert packed["efficiency"] == pytest.approx(tokens / (len(index) * packing.max_seq_length))
    tokenizer = corpus.manifest.tokenizer
    for length, lines in found["lines"].items():
        index = open_index(corpus, "validation", PackingConfig(int(length)))
        collator = Collator(index, evaluation_masker(MaskingConfig(), tokenizer), tokenizer, int(length))
        assert lines == CountModel.of(corpus).losses(collator, 2048)
    assert list(found["lines"]) == ["16", "64"]
    assert [amount["documents"] for amount in found["inputs"].values()] == [50, 10]
    for (path, amount), texts in zip(found["inputs"].items(), (TEXTS[:50], TEXTS[50:]), strict=True):
        assert path.endswith(".txt")
        assert amount["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert sum(amount["tokens"] for amount in found["inputs"].values()) == len(ids)
    counts = Counter(ids)
    del counts[2]
    words = found["vocabulary"]
    assert (words["ids"], words["used"]) == (395, len(counts))
    assert [entry["count"] for entry in words["most_used"]] == [count for _, count in counts.most_common(10)]
    assert [entry["count"] for entry in words["least_used"]] == sorted(counts.values())[:10]
    assert all(counts[entry["id"]] == entry["count"] for entry in words["most_used"] + words["least_used"])


def test_stats_of_a_folder_whose_inputs_are_unknown(corpus, capsys):
    stats = corpus_stats(corpus, [])
    assert stats.inputs == {}
    assert stats.splits["train"].amount.documents == corpus.manifest.documents("train")
    assert stats.id_counts.sum() == corpus.manifest.tokens("train") + corpus.manifest.tokens("validation")


def test_stats_are_read_by_people_and_drawn(prepared, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert run(f"stats {prepared[0]} --plot {tmp_path / 'p.png'}") == 0
    output = capsys.readouterr().out
    for word in (
        "train ",
        "validation ",
        "bytes/token",
        "--max_seq_length 512",
        "a.txt",
        "from counts of neighbours",
        "ordinary ids used",
    ):
        assert word in output
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_is_refused_before_the_shards_are_read(prepared, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(stats, "corpus_stats", None)
    assert run(f"stats {prepared[0]} --plot {tmp_path / 'missing/p.png'}") == 2
    assert "choose a file in a folder that exists" in capsys.readouterr().err
    assert run(f"stats {prepared[0]} --plot {tmp_path / 'p.txt.xyz'}") == 2
    assert "p.txt.xyz' is no image that matplotlib writes: choose one of ." in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(f"stats {prepared[0]} --plot {tmp_path / 'p.png'}") == 2
    assert "pip install 'ds_roberta[plot]'" in capsys.readouterr().err
