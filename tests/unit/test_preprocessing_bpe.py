"""Training, copying and applying RoBERTa tokenizers."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ds_roberta.data.tokenizer import TokenizerInfo
from ds_roberta.errors import UserError
from preprocessing.tokens.bpe import is_tokenizer_folder, train_bpe
from preprocessing.tokens.corpus_tokenizer import copy_tokenizer
from preprocessing.tokens.encoders import HUGGINGFACE, make_encoder

SPECIAL_LETTERS = "a </s> b <mask> <s><pad><unk>"
TEXT = [["Hello world, hello there.", " The world is round."], [SPECIAL_LETTERS] * 5, ["Grüße, 世界 🙂"]] * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    assert train_bpe(iter(TEXT), 300, folder) == 300
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return encoder_of(folder)


def encoder_of(folder):
    return make_encoder(HUGGINGFACE, folder, TokenizerInfo.read(folder))[0]


def change(folder, target, **changes):
    """A copy of a tokenizer folder whose tokenizer.json has other top-level values."""
    target.mkdir()
    content = json.loads((folder / "tokenizer.json").read_text())
    (target / "tokenizer.json").write_text(json.dumps({**content, **changes}))
    return target


def test_words_are_bounded_and_ordinary_text_gives_what_it_gave(tmp_path):
    text = (Path(__file__).parents[2] / "examples/corpus/ethan-frome.txt").read_text(encoding="utf-8")
    lines = [paragraph.split("\n") for paragraph in text[:60_000].split("\n\n")]
    reference = Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=999,
        min_frequency=2,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    reference.train_from_iterator(iter(lines), trainer)
    (tmp_path / "a").mkdir()
    train_bpe(iter(lines), 1000, tmp_path / "a")
    trained = json.loads((tmp_path / "a/tokenizer.json").read_text())["model"]
    expected = json.loads(reference.to_str())["model"]
    assert trained["merges"] == expected["merges"]
    assert trained["vocab"] == {**expected["vocab"], "<mask>": 999}

    (tmp_path / "b").mkdir()
    train_bpe(iter([["a" * 9999]]), 300, tmp_path / "b")
    trained = json.loads((tmp_path / "b/tokenizer.json").read_text())["model"]
    assert max(map(len, trained["vocab"])) == 1024  # the next merge would be of a longer word


def test_special_ids_are_those_of_roberta(folder):
    info = TokenizerInfo.read(folder)
    assert (info.bos_token_id, info.pad_token_id, info.eos_token_id, info.mask_token_id) == (0, 1, 2, 299)
    assert (info.vocab_size, info.special_ids) == (300, (0, 1, 2, 3, 299))


def test_transformers_opens_it_as_a_roberta_tokenizer(folder, encoder):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer).__name__.startswith("Roberta")
    assert (tokenizer.model_max_length, len(tokenizer)) == (512, 300)
    names = ("bos", "pad", "eos", "unk", "mask", "cls", "sep")
    assert [getattr(tokenizer, f"{name}_token_id") for name in names] == [0, 1, 2, 3, 299, 0, 2]
    ids = tokenizer("Hello world").input_ids
    assert (ids[0], ids[-1]) == (0, 2)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hello world"
    # Like RoBERTa's, the mask takes the space before it.
    assert tokenizer("Hello <mask>").input_ids == [*tokenizer("Hello").input_ids[:-1], 299, 2]
    text = "Grüße, 世界 🙂 the unseen \x00 bytes"
    document = encoder.encode([text.encode()]).ids
    assert document.tolist() == [*tokenizer(text, add_special_tokens=False).input_ids, 2]


def test_the_same_text_gives_the_same_bytes(folder, tmp_path):
    train_bpe(iter(TEXT), 300, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_small_text_gives_fewer_ids(tmp_path):
    size = train_bpe(iter([["abab"]]), 1000, tmp_path)
    info = TokenizerInfo.read(tmp_path)
    assert size == info.vocab_size == 262
    assert info.mask_token_id == 261


def test_truncation_and_padding_saved_with_a_tokenizer_are_not_applied(folder, encoder, tmp_path):
    other = change(
        folder,
        tmp_path / "other",
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1}
        | {"pad_type_id": 0, "pad_token": "<pad>"},
    )
    text = [b"Hello world, hello there."]
    expected, found = (encode(text).ids.tolist() for encode in (encoder.encode, encoder_of(other).encode))
    assert len(expected) > 3
    assert found == expected


def test_a_mask_that_is_not_marked_special_stays_text(folder, tmp_path):
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    other = change(folder, tmp_path / "other", added_tokens=[{**token, "special": False} for token in added])
    document = encoder_of(other).encode([SPECIAL_LETTERS.encode()]).ids
    assert not set(document[:-1].tolist()) & {0, 1, 2, 3, 299}


def test_a_copy_is_the_same_tokenizer(folder, tmp_path):
    info = copy_tokenizer(folder, tmp_path / "copy")
    assert info == TokenizerInfo.read(folder) == TokenizerInfo.read(tmp_path / "copy")
    assert is_tokenizer_folder(tmp_path / "copy")


def test_a_tokenizer_without_config_gets_one(folder, tmp_path):
    bare = change(folder, tmp_path / "bare")
    assert copy_tokenizer(bare, tmp_path / "copy") == TokenizerInfo.read(folder)
    assert json.loads((tmp_path / "copy/tokenizer_config.json").read_text())["tokenizer_class"] == "RobertaTokenizer"


def test_a_config_without_a_class_is_completed(folder, tmp_path):
    bare = change(folder, tmp_path / "bare")
    (bare / "tokenizer_config.json").write_text('{"model_max_length": 99}')
    copy_tokenizer(bare, tmp_path / "copy")
    copied = json.loads((tmp_path / "copy/tokenizer_config.json").read_text())
    assert copied == {**json.loads((folder / "tokenizer_config.json").read_text()), "model_max_length": 99}


def test_vocabulary_and_merges_are_enough(folder, tmp_path):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in model["merges"]))
    assert copy_tokenizer(tmp_path, tmp_path / "copy") == TokenizerInfo.read(folder)
    assert (tmp_path / "copy/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()

    (tmp_path / "vocab.json").write_text(json.dumps({k: v for k, v in model["vocab"].items() if k != "<mask>"}))
    with pytest.raises(UserError, match="<mask>"):
        copy_tokenizer(tmp_path, tmp_path / "copy 2")


def test_unusable_tokenizers_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="missing"):
        copy_tokenizer(tmp_path / "nothing", tmp_path / "copy")
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4, "<mask>": 5}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    words = change(folder, tmp_path / "words", model=model, added_tokens=[])
    with pytest.raises(UserError, match="lacks 255 of the 256 bytes"):
        copy_tokenizer(words, tmp_path / "copy")


METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}


def model_of(kind, vocabulary):
    """A model of another kind with the same tokens, the letters of the 256 bytes among them."""
    if kind == "Unigram":
        return models.Unigram([(token, -1.0) for token in vocabulary], unk_id=vocabulary["<unk>"])
    return {"WordPiece": models.WordPiece, "WordLevel": models.WordLevel}[kind](vocabulary, unk_token="<unk>")


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", "WordLevel"])
@pytest.mark.parametrize("splitter", [METASPACE, None])
def test_other_kinds_with_the_letters_of_all_bytes_are_refused(folder, tmp_path, kind, splitter):
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    model = json.loads(model_of(kind, vocabulary).__getstate__())
    changes = {} if splitter is None else {"pre_tokenizer": splitter, "decoder": splitter}
    other = change(folder, tmp_path / "other", model=model, **changes)
    with pytest.raises(UserError, match=rf"has a model of type {kind}: use a tokenizer of the RoBERTa kind"):
        copy_tokenizer(other, tmp_path / "copy")


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"pre_tokenizer": METASPACE, "decoder": METASPACE}, "Latin"),  # BPE, not of bytes
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Latin"),
        ({"decoder": None}, "Latin: .*\u0120"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "\\p{Thai}"}, "content": ""}}, "Thai: .* becomes ' '"),
    ],
)
def test_a_tokenizer_that_loses_text_is_refused(folder, tmp_path, changes, lost):
    with pytest.raises(UserError, match=rf"would lose text \({lost}.*: use a tokenizer of the RoBERTa kind"):
        copy_tokenizer(change(folder, tmp_path / "other", **changes), tmp_path / "copy")


@pytest.mark.parametrize(
    ("normalizer", "told"),
    [
        (None, ""),
        ({"type": "NFC"}, "changes text: combining marks ("),
        ({"type": "Lowercase"}, "changes text: Latin ("),
    ],
)
def test_what_a_normalizer_changes_is_reported(folder, tmp_path, capsys, normalizer, told):
    splitter = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    other = change(folder, tmp_path / "other", normalizer=normalizer, pre_tokenizer=splitter)
    copy_tokenizer(other, tmp_path / "copy")
    printed = capsys.readouterr().out
    assert told in printed if told else not printed


def test_a_file_that_does_not_name_its_model_has_the_kind_of_its_merges(folder, tmp_path):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    del model["type"]
    assert copy_tokenizer(change(folder, tmp_path / "old", model=model), tmp_path / "copy").vocab_size == 300


def test_a_folder_with_anything_else_is_not_replaceable(folder, tmp_path):
    other = change(folder, tmp_path / "other")
    assert is_tokenizer_folder(other)
    (other / "model.safetensors").touch()
    assert not is_tokenizer_folder(other)
