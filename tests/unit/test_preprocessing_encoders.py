"""Both tokenizer backends: the same ids, letters of special tokens as text, and what happens if they differ."""

import json
import random
import unicodedata
from itertools import chain

import numpy as np
import pytest
from prepare import prepare_corpus
from tokenizers import Tokenizer

from ds_roberta.data.tokenizer import TokenizerInfo
from ds_roberta.errors import UserError
from preprocessing import units
from preprocessing.tokens import encoders
from preprocessing.tokens.bpe import train_bpe
from preprocessing.tokens.encoders import (
    AUTO,
    BACKENDS,
    GIGATOKEN,
    HUGGINGFACE,
    BackendDifference,
    Encoded,
    choose_backend,
    make_encoder,
)
from preprocessing.units import ShardOptions

SPECIAL_LETTERS = "a </s> b <mask> <s><pad><unk>"
TEXT = [
    ["Hello world, hello there.", " The world is round."],
    [SPECIAL_LETTERS] * 5,
    ["Grüße, 世界 🙂"],
    ["a" + " " * 9 + "b"],
] * 20
CONTROL_IDS = {0, 1, 2, 3, 299}
OPTIONS = ShardOptions(validation_fraction=0.2, unit_bytes=4000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    assert train_bpe(iter(TEXT), 300, folder) == 300
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert "ĠĠ" in vocabulary  # so that the ids tell where a run of spaces was cut
    return folder


@pytest.fixture(scope="module")
def info(folder):
    return TokenizerInfo.read(folder)


@pytest.fixture(scope="module")
def reference(folder, info):
    return make_encoder(HUGGINGFACE, folder, info)[0]


@pytest.fixture(params=[HUGGINGFACE, GIGATOKEN])
def encoder(request, folder, info):
    if request.param == GIGATOKEN:
        pytest.importorskip("gigatoken")
    return make_encoder(request.param, folder, info)[0]


@pytest.fixture
def gigatoken(folder, info):
    pytest.importorskip("gigatoken")
    return make_encoder(GIGATOKEN, folder, info)[0]


def equal(one, other):
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def random_documents(count, seed=0):
    rng = random.Random(seed)
    alphabet = "aabbcdeehlllooorrttw   \t'’.,!?0123456789ÄéßñЖя中文日本語한국🙂\u00a0\u3000\u200b\x00\x1c<>/s"
    words = ["Hello", " world", "'s", "'ll", "  ", " round", *SPECIAL_LETTERS.split()]

    def sentence():
        parts = (rng.choice(words) if rng.random() < 0.4 else rng.choice(alphabet) for _ in range(rng.randrange(1, 60)))
        return "".join(parts).rstrip() or "x"

    return ["\n".join(sentence() for _ in range(rng.randrange(1, 6))).encode() for _ in range(count)]


def test_a_document_is_its_sentences_closed_by_the_separator(encoder):
    def line(text):
        return encoder.encode([text]).ids[:-1].tolist()

    encoded = encoder.encode([b"one line\nand another", "a third\r世界".encode()])
    lines = [line(b"one line"), line(b" and another"), line(b"a third"), line("世界".encode())]
    assert encoded.ids.tolist() == [*lines[0], *lines[1], 2, *lines[2], *lines[3], 2]
    assert encoded.lengths.tolist() == [len(lines[0] + lines[1]) + 1, len(lines[2] + lines[3]) + 1]
    ends = [len(lines[0]), len(lines[0] + lines[1]), len(lines[2]), len(lines[2] + lines[3])]
    assert encoded.sentence_ends.tolist() == ends
    assert encoded.sentence_counts.tolist() == [2, 2]
    assert (encoded.ids.dtype, encoded.sentence_ends.dtype) == ("uint16", "uint32")


def test_documents_are_selected_with_their_sentences(reference):
    documents = random_documents(20)
    chosen = np.arange(20) % 3 == 0
    assert equal(
        Encoded.concatenate([reference.encode(documents[:5]), reference.encode(documents[5:])]).select(chosen),
        reference.encode([document for document, keep in zip(documents, chosen, strict=True) if keep]),
    )


def test_letters_of_special_tokens_stay_text(encoder):
    ids = encoder.encode([SPECIAL_LETTERS.encode()]).ids
    assert ids[-1] == 2
    assert not set(ids[:-1].tolist()) & CONTROL_IDS


def test_the_letters_of_any_special_token_are_found(folder, info):
    _, letters = make_encoder(HUGGINGFACE, folder, info)
    for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>"):
        assert letters.occur_in(f"text{token}text".encode())
    assert not letters.occur_in(b"<S> s> mask < mask>")


def test_both_backends_give_the_same_ids(gigatoken, reference):
    for seed in range(5):
        documents = [document.replace(b"\n", b"\r", 2) for document in random_documents(100, seed)]
        assert equal(gigatoken.encode(documents), reference.encode(documents))


def test_merges_over_a_line_end_are_never_used(folder, tmp_path):
    pytest.importorskip("gigatoken")
    content = json.loads((folder / "tokenizer.json").read_text())
    tokens = [end + next_letter for end in "Ċč" for next_letter in ("Ġ", "ĠĠ", "h", "Ċ", "Âł")]
    content["model"]["vocab"].update({token: 300 + number for number, token in enumerate(["Âł", *tokens])})
    content["model"]["merges"][:0] = [["Â", "ł"], ["Ġ", "Ġ"], *([token[0], token[1:]] for token in tokens)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    info = TokenizerInfo.read(tmp_path)
    one, other = (make_encoder(name, tmp_path, info)[0] for name in (GIGATOKEN, HUGGINGFACE))
    documents = [b"hello\n  hello\n \t h\n   h", "  h\nhello\n\u00a0h".encode(), "\u00a0 h\n\th".encode()]
    assert equal(one.encode(documents), other.encode(documents))
    assert equal(one.encode(random_documents(100)), other.encode(random_documents(100)))


def test_both_backends_agree_on_every_assigned_character(gigatoken, reference):
    # Every character of the small planes' scripts; of the thousands of Han, Hangul and Tangut, all letters, some.
    points = [p for p in range(0x80, 0x20000) if not (0x3400 <= p < 0xD800 or 0x17000 <= p < 0x18D00) or p % 64 == 0]
    characters = [c for c in map(chr, points) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    assert len(characters) > 29_000
    documents = [f"{c}'s 1{c}a{c}  {c}.".encode() for c in characters]
    assert equal(gigatoken.encode(documents), reference.encode(documents))


def test_an_unassigned_character_is_left_to_the_reference(gigatoken, reference):
    # Backends of different Unicode versions need not agree whether this is a letter.
    for character in ("\U00010940", "\u088f", "\uffff"):
        if unicodedata.category(character) == "Cn":
            document = f"one\n{character}'s two".encode()
            gigatoken._tokenizer = None  # so that using it fails
            assert equal(gigatoken.encode([document]), reference.encode([document]))


def test_the_reference_gives_the_ids_of_whole_lines(folder, info, monkeypatch):
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.encode_special_tokens = True
    monkeypatch.setattr(encoders, "_KNOWN_PIECES", 50)
    monkeypatch.setattr(encoders, "_KNOWN_CHARACTERS", 5)
    monkeypatch.setattr(encoders, "_CALL_CHARACTERS", 100)
    encoder = make_encoder(HUGGINGFACE, folder, info)[0]
    for seed in range(4):
        lines = [line for text in random_documents(100, seed) for line in text.decode().split("\n")]
        lines += [" " + line for line in lines[:50]]
        ids, counts = encoder.encode_lines(lines)
        expected = [plain.encode(line, add_special_tokens=False).ids for line in lines]
        assert counts.tolist() == list(map(len, expected))
        assert ids.tolist() == list(chain.from_iterable(expected))


def test_a_tokenizer_that_joins_words_over_spaces_sees_whole_lines(folder, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    joined = {"id": 300, "content": "Hello world", "single_word": False, "lstrip": False, "rstrip": False}
    content["added_tokens"].append({**joined, "normalized": False, "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    encoder = make_encoder(HUGGINGFACE, tmp_path, TokenizerInfo.read(tmp_path))[0]
    assert encoder.encode([b"Hello world"]).ids.tolist() == [300, 2]


@pytest.mark.parametrize(
    "documents",
    [random_documents(50), ["中".encode() * 3000], ["中\n文".encode() * 3000], [b"short"], [b"word " * 3000 + b"."]],
    ids=["mixed", "a line without spaces", "lines without spaces", "short", "one line"],
)
def test_a_sample_is_compared(gigatoken, reference, monkeypatch, documents):
    assert equal(gigatoken.encode(documents), reference.encode(documents))
    monkeypatch.setattr(gigatoken._reference, "encode_lines", lambda *_, **__: (np.array([7]), np.array([1])))
    with pytest.raises(BackendDifference, match="other ids than huggingface near '"):
        gigatoken.encode(documents)


def test_the_cache_is_dropped_when_the_process_has_grown(gigatoken, reference, monkeypatch):
    monkeypatch.setattr(encoders, "_CACHE_BYTES", -1)
    before, documents = gigatoken._tokenizer, random_documents(20)
    for _ in range(2):
        assert equal(gigatoken.encode(documents), reference.encode(documents))
    assert gigatoken._tokenizer is not before


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\n".join(random_documents(300, seed=3)))
    return str(path)


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_shards_do_not_depend_on_the_backend(folder, file, tmp_path, capsys):
    pytest.importorskip("gigatoken")
    totals = {}
    for backend in BACKENDS:
        _, totals[backend] = prepare_corpus([file], folder, tmp_path / backend, OPTIONS, 1, backend=backend)
    assert content(tmp_path / HUGGINGFACE) == content(tmp_path / GIGATOKEN) == content(tmp_path / AUTO)
    assert totals[HUGGINGFACE] == totals[GIGATOKEN]
    assert totals[AUTO].special_documents > 20
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tokenizer backend: ")]
    assert [line.split()[2] for line in said] == ["gigatoken", "huggingface", "gigatoken"]


def test_a_unit_on_which_the_backends_differ_is_done_again_with_a_warning(folder, file, tmp_path, capsys, monkeypatch):
    pytest.importorskip("gigatoken")
    _, expected = prepare_corpus([file], folder, tmp_path / "reference", OPTIONS, 1, backend=HUGGINGFACE)
    calls = []

    def differ_late(self, text, *_):
        calls.append(text)
        if len(calls) == 3:
            raise BackendDifference("near 'here'")

    monkeypatch.setattr(encoders.GigatokenEncoder, "_compare", differ_late)
    monkeypatch.setattr(units, "_BATCH_BYTES", 1000)
    _, totals = prepare_corpus([file], folder, tmp_path / "fast", OPTIONS, 1, backend=GIGATOKEN)
    assert content(tmp_path / "fast") == content(tmp_path / "reference")
    assert totals == expected
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning: gigatoken" in line]
    assert all(part in warning for part in ("near 'here'", "a.txt", "unit 0", "--tokenizer_backend huggingface"))
    assert len(calls) > 10  # the units after it are tried again


def test_gigatoken_that_fails_is_not_used(folder, file, tmp_path, capsys, monkeypatch):
    gigatoken = pytest.importorskip("gigatoken")
    prepare_corpus([file], folder, tmp_path / "reference", OPTIONS, 1, backend=HUGGINGFACE)

    def fail(data):
        raise ValueError("odd merges")

    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", fail)
    prepare_corpus([file], folder, tmp_path / "fast", OPTIONS, 1, backend=GIGATOKEN)
    assert content(tmp_path / "fast") == content(tmp_path / "reference")
    assert "cannot load this tokenizer (ValueError('odd merges'))" in capsys.readouterr().err


def test_gigatoken_that_is_not_installed(folder, info, monkeypatch):
    monkeypatch.setattr(encoders, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ds_roberta\[fast\]'"):
        choose_backend(GIGATOKEN, folder)
    backend, line = choose_backend(AUTO, folder)
    assert backend == HUGGINGFACE
    assert "not installed" in line


def test_a_space_before_a_text_is_put_there_once(folder, reference, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    changed = {**content, "pre_tokenizer": {**content["pre_tokenizer"], "add_prefix_space": True}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    encoder = make_encoder(HUGGINGFACE, tmp_path, TokenizerInfo.read(folder))[0]
    spaced = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("Hello world", "a  b", "\thello"):
        expected = spaced.encode(text, add_special_tokens=False).ids
        assert encoder.encode([text.encode()]).ids[:-1].tolist() == expected
    for document in (b"Hello world\rhello", "one line\nand\r世界\r中文".encode()):
        assert equal(encoder.encode([document]), reference.encode([b" " + document]))
    assert encoder.shows_spaces
    (tmp_path / "tokenizer.json").write_text(json.dumps({**changed, "normalizer": {"type": "Lowercase"}}))
    assert not make_encoder(HUGGINGFACE, tmp_path, TokenizerInfo.read(folder))[0].shows_spaces


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({"normalizer": {"type": "NFC"}}, "a normalizer"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}}, "pre-tokenizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer"),
    ],
)
def test_another_kind_of_tokenizer_is_left_to_the_reference(folder, tmp_path, monkeypatch, changes, obstacle):
    monkeypatch.setattr(encoders, "find_spec", lambda name: True)
    original = json.loads((folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**original, **changes}))
    backend, line = choose_backend(AUTO, tmp_path)
    assert backend == HUGGINGFACE
    assert obstacle in line
    with pytest.raises(UserError, match=obstacle):
        choose_backend(GIGATOKEN, tmp_path)
