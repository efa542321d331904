"""Prepared data with a SentencePiece Unigram: transformers' ids, words, unknown characters, and what is shown of it."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import transformers
from unigram_folders import save_tokenizer

from ds_roberta.data.shards import Corpus
from ds_roberta.data.tokenizer import TokenizerInfo, ids_inside_characters, token_bytes
from ds_roberta.data.tokenizer_files import training_tokenizer, write_tokenizer
from ds_roberta.data.words import word_bounds, word_flags
from ds_roberta.errors import UserError
from ds_roberta.transformers_folder import check_tokenizer
from preprocessing.commands import shard
from preprocessing.prepared.stats import as_json, as_text, corpus_stats
from preprocessing.prepared.stored_documents import Decoder, Origins, StoredDocuments
from preprocessing.reading.documents import ReadOptions
from preprocessing.tokens.corpus_tokenizer import copy_tokenizer
from preprocessing.tokens.encoders import AUTO, HUGGINGFACE, choose_backend, make_encoder
from preprocessing.units import ShardOptions

FAMILIES = {"XLMRoberta": (0, 2), "Camembert": (5, 6)}  # the ids of <s> and </s>
LETTERS = (
    "aabcdeehlllooorrttw éèàßü ÄñßЖя中文日本語한국하🙂👩\u200d👧  \t\u00a0\u3000\u200b\u2028\x85\x1c\x00\x07"
    "\u0301\u0308\u0600\ufeff▁▁ＡＢﬁ①…</s'’.,!?0123ก็ำه"
)
PARTS = ["Les", " élèves", "étudient", "  ", "▁", " ▁▁", "e\u0301", " \u0301", "\u0600 ", "ᄒ\u1161", "ﬁ\u0301"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("unigrams")
    for family in FAMILIES:
        save_tokenizer(root / family, family)
    return root


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def folder(folders, family):
    return folders / family


@pytest.fixture
def theirs(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return lambda text: tokenizer(text, verbose=False)["input_ids"][1:-1]


@pytest.fixture
def encoder(folder, tmp_path):
    info = copy_tokenizer(folder, tmp_path / "tokenizer")
    return make_encoder(HUGGINGFACE, tmp_path / "tokenizer", info)[0]


def random_lines(count, seed):
    rng = random.Random(seed)
    for _ in range(count):
        parts = (rng.choice(PARTS if rng.random() < 0.3 else LETTERS) for _ in range(rng.randrange(1, 60)))
        yield "".join(parts)


def change(source, target, **changes):
    """Copy a tokenizer.json alone, changed."""
    target.mkdir()
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    (target / "tokenizer.json").write_text(json.dumps(content | changes), encoding="utf-8")
    return target


def test_the_ids_are_those_of_transformers(encoder, theirs):
    lines = [line for line in random_lines(600, 0) if theirs(line)]
    assert len(lines) > 590
    for line in lines:
        assert encoder.encode([line.encode()]).ids[:-1].tolist() == theirs(line), line
    whole = encoder.encode(["\n".join(lines).encode()])  # with all words known
    assert whole.ids[:-1].tolist() == [id_ for line in lines for id_ in theirs(line)]
    assert np.diff(whole.sentence_ends, prepend=0).tolist() == [len(theirs(line)) for line in lines]


def test_a_sentence_after_another_without_a_space_has_no_mark(encoder, theirs):
    text = "我们今天去北京。你喜欢看电影吗？ Les élèves"
    encoded = encoder.encode([text.replace("。", "。\r").replace("？ ", "？\n").encode()])
    assert encoded.ids[:-1].tolist() == theirs(text)
    assert encoded.sentence_counts.tolist() == [3]


def test_sentences_without_tokens_are_left_out(encoder, theirs, folder):
    info = TokenizerInfo.read(folder)
    encoded = encoder.encode([b"abc", "\u200b\nLes\n\ufeff\nabc".encode(), "\u200b\n\u200b".encode(), b"abc"])
    les, abc = theirs("Les"), theirs("abc")
    eos = info.eos_token_id
    assert encoded.ids.tolist() == [*abc, eos, *les, *abc, eos, 3, eos, *abc, eos]
    assert encoded.sentence_counts.tolist() == [1, 2, 1, 1]
    assert encoded.sentence_ends.tolist() == [len(abc), len(les), len(les + abc), 1, len(abc)]
    assert encoded.lengths.sum() == len(encoded.ids)
    assert encoder.unknown_tokens(encoded).tolist() == [0, 0, 1, 0]


def test_letters_of_special_tokens_stay_text(folder, encoder, theirs):
    info, text = TokenizerInfo.read(folder), "a </s> b<mask> <s><pad><s>NOTUSED <unk>"
    assert set(info.special_ids) & set(theirs(text))  # transformers takes them for the tokens
    ids = encoder.encode([text.encode()]).ids
    assert ids[-1] == info.eos_token_id
    assert not set(ids[:-1].tolist()) & set(info.special_ids)
    tokens = training_tokenizer(folder).encode(text, add_special_tokens=False)
    assert tokens.ids == ids[:-1].tolist()


def test_the_written_tokenizer_is_transformers_own(folder, family, tmp_path):
    write_tokenizer(folder, tmp_path)
    check_tokenizer(tmp_path, folder)
    opened, original = (transformers.AutoTokenizer.from_pretrained(each) for each in (tmp_path, folder))
    assert type(opened) is type(original) is getattr(transformers, f"{family}Tokenizer")
    assert TokenizerInfo.read(tmp_path) == TokenizerInfo.read(folder)
    assert opened.model_max_length == 62
    for name in ("get_vocab", "__len__"):
        assert getattr(opened, name)() == getattr(original, name)()
    assert sorted(opened.all_special_ids) == sorted(original.all_special_ids)
    for line in ("Les <mask> étudient", *random_lines(50, 1)):
        assert opened(line, "Les")["input_ids"] == original(line, "Les")["input_ids"]


OLD_METASPACE = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}


@pytest.mark.parametrize("split", [[{"type": "WhitespaceSplit"}], []])
def test_files_of_older_versions_are_read_as_transformers_reads_them(folder, theirs, tmp_path, split):
    table = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["normalizer"]
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    old = change(
        folder,
        tmp_path / "old",
        normalizer={"type": "Sequence", "normalizers": [table, strip, spaces]},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*split, OLD_METASPACE]},
    )
    assert TokenizerInfo.read(old) == TokenizerInfo.read(folder)
    for line in random_lines(20, 2):
        assert training_tokenizer(old).encode(line, add_special_tokens=False).ids == theirs(line)


def test_old_files_of_camembert_name_two_tokens_unknown(folders, tmp_path):
    vocabulary = model(folders / "Camembert")["model"]["vocab"]
    vocabulary[4][0] = "<unk>"
    old = change(folders / "Camembert", tmp_path / "old", **model(folders / "Camembert", vocab=vocabulary))
    tokens = json.loads((old / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    change(old, tmp_path / "older", added_tokens=[token for token in tokens if token["id"] != 4])
    assert copy_tokenizer(tmp_path / "older", tmp_path / "copy") == TokenizerInfo.read(folders / "Camembert")
    assert type(transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")).__name__ == "CamembertTokenizer"


def test_what_the_class_would_drop_is_opened_by_the_generic_one(folder, tmp_path):
    lower = change(folder, tmp_path / "lower", normalizer={"type": "Lowercase"})
    info = copy_tokenizer(lower, tmp_path / "tokenizer")
    check_tokenizer(tmp_path / "tokenizer", lower)
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert type(opened).__name__ == "TokenizersBackend"
    encoder, _ = make_encoder(HUGGINGFACE, tmp_path / "tokenizer", info)
    assert opened("LES abc")["input_ids"][1:-1] == encoder.encode([b"LES abc"]).ids[:-1].tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Lowercase"}},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Punctuation", "behavior": "Isolated"}, OLD_METASPACE],
            }
        },
    ],
)
def test_sentences_are_found_only_if_the_ids_show_spaces(folder, tmp_path, changes):
    other = change(folder, tmp_path / "other", **changes)
    (tmp_path / "text.txt").write_text("我们今天去北京。你喜欢看电影吗？", encoding="utf-8")
    arguments = ([str(tmp_path / "text.txt")], other, tmp_path / "data")
    rules = ShardOptions(ReadOptions(sentences="rules"), validation_fraction=0)
    with pytest.raises(UserError, match=r"--sentences rules does not go with this tokenizer.* use --sentences lines"):
        shard(*arguments, rules, workers=1)
    assert not list(tmp_path.glob("*data*"))
    shard(*arguments, ShardOptions(validation_fraction=0), workers=1)
    shard([str(tmp_path / "text.txt")], folder, tmp_path / "rules", rules, workers=1)


def model(folder, **changes):
    return {"model": {**json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"], **changes}}


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        (lambda folder: {"pre_tokenizer": {"type": "Whitespace"}}, "a model of type Unigram"),
        (lambda folder: {"pre_tokenizer": {**OLD_METASPACE, "add_prefix_space": False}}, "a model of type Unigram"),
        (lambda folder: model(folder, byte_fallback=True), "a Unigram with byte_fallback"),
        (lambda folder: model(folder, unk_id=1), "a Unigram whose unknown token is not <unk>"),
        (lambda folder: model(folder, unk_id=None), "cannot be read"),
    ],
)
def test_other_unigrams_are_refused(folder, tmp_path, changes, obstacle):
    with pytest.raises(UserError, match=obstacle):
        copy_tokenizer(change(folder, tmp_path / "other", **changes(folder)), tmp_path / "tokenizer")


def test_a_folder_with_only_sentencepieces_own_file_says_what_to_do(tmp_path):
    (tmp_path / "sentencepiece.bpe.model").touch()
    with pytest.raises(UserError, match=r"no tokenizer.json.*from_pretrained\(DIR\).save_pretrained\(DIR\)"):
        TokenizerInfo.read(tmp_path)


def test_the_unknown_token_is_special_in_any_file(folder, tmp_path):
    assert 3 in TokenizerInfo.read(change(folder, tmp_path / "bare", added_tokens=[])).special_ids


def test_scores_are_part_of_the_identity(folder, tmp_path):
    vocabulary = model(folder)["model"]["vocab"]
    vocabulary[-2][1] -= 1
    other = change(folder, tmp_path / "other", **model(folder, vocab=vocabulary))
    assert TokenizerInfo.read(other).fingerprint != TokenizerInfo.read(folder).fingerprint


def test_words_begin_at_the_mark(folder, encoder):
    text = "Les élèves étudient à 🙂 l'école，我们今天 カメラ et la Straße"
    ids = encoder.encode([text.encode()]).ids[:-1]
    info, texts = TokenizerInfo.read(folder), token_bytes(folder)
    flags, special = word_flags(folder, info.vocab_size)[ids][None], np.isin(ids, info.special_ids)[None]
    words = [
        b"".join(texts[id_] for id_ in ids[start:end].tolist()).decode()
        for start, end in zip(*word_bounds(flags, special), strict=True)
    ]
    expected = [" Les", " élèves", " étudient", " à", " ", "<unk>", " l'école,", "我们", "今", "天", " カメラ"]
    assert words == [*expected, " et", " la", " Straße"]
    assert not ids_inside_characters(folder).any()


def test_unknown_characters_are_counted_and_documents_found(folder, tmp_path, capsys):
    documents = ["Les élèves  étudient ﬁn.", "Der Schüler 🙂🙂 lernt 🙂.", "Der Schüler 🙃 lernt.", "今天。"]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join([*documents, documents[1]]), encoding="utf-8")
    options = ShardOptions(validation_fraction=0, dedup="exact")
    shard([str(path)], folder, tmp_path / "data", options, workers=1)
    corpus, printed = Corpus.open(tmp_path / "data"), capsys.readouterr().out
    assert corpus.manifest.documents("train") == 4
    assert "3 tokens (" in printed
    assert "are <unk>: characters that the tokenizer does not know" in printed
    assert "the first of them in texts of many kinds: " in printed
    assert "Greek ('Ξεσκεπάζω')" in printed
    stored, decoder = StoredDocuments(corpus, "train"), Decoder(corpus)
    sentences = [stored.sentences(stored.document(number)) for number in range(4)]
    shown = ["Les élèves étudient fin.", "Der Schüler <unk> lernt <unk>.", "Der Schüler <unk> lernt.", "今天。"]
    assert [decoder.text(each) for each in sentences] == shown
    origins, starts = Origins(corpus, stored, decoder), [path.read_bytes().index(each.encode()) for each in documents]
    assert [origins.span(stored.document(number))[0] for number in range(4)] == starts
    content = as_json(corpus_stats(corpus, []), corpus)
    assert content["vocabulary"]["unknown"] == 3
    used = {entry["text"] for entry in content["vocabulary"]["most_used"]}
    assert {" ", "ler"} <= used
    assert "▁" not in used
    assert content["splits"]["train"]["text_bytes"] == sum(
        len(f" {text}".replace("<unk>", "").encode()) for text in shown
    )
    assert any("3 tokens are <unk>" in line for line in as_text(content))


def test_no_other_backend_replaces_it(folder, tmp_path):
    copy_tokenizer(folder, tmp_path / "tokenizer")
    backend, why = choose_backend(AUTO, Path(tmp_path / "tokenizer"))
    assert backend == HUGGINGFACE
    assert "a Unigram model" in why or "not installed" in why
