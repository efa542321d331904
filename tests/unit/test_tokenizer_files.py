"""A tokenizer folder is completed from what training reads, and transformers opens it as the same tokenizer."""

import json

import pytest
import transformers
from shared_fixtures import change_json

from ds_roberta.data.tokenizer import TokenizerInfo, tokenizer_content
from ds_roberta.data.tokenizer_files import stated_length, training_tokenizer, write_tokenizer
from ds_roberta.errors import UserError
from ds_roberta.transformers_folder import check_tokenizer, open_tokenizer

TEXT = "kato miren, Grüße 123  世界 🙂."
SPECIAL_TOKENS = {"bos_token": 0, "cls_token": 0, "pad_token": 1, "eos_token": 2, "sep_token": 2, "unk_token": 3}


@pytest.fixture
def make(tokenizer_folder, tmp_path):
    """A function that makes a tokenizer's folder; `changes` are of tokenizer.json."""

    def make_folder(files=None, **changes):
        folder = tmp_path / "source"
        folder.mkdir()
        content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(content | changes))
        for name, entry in (files or {}).items():
            (folder / name).write_text(json.dumps(entry))
        (tmp_path / "written").mkdir()
        return folder

    return make_folder


def added(**changes):
    """The special tokens of tokenizer.json with other flags."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} | changes
    ids = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 399}
    return [{"id": token_id, "content": name} | flags for name, token_id in ids.items()]


def token(name, **flags):
    """A token as transformers 4 wrote it."""
    return {"__type": "AddedToken", "content": name, "lstrip": False, "normalized": True} | flags


CONFIGS = {
    "as the hub has it": {"model_max_length": 512},
    "no limit": {"model_max_length": float("inf")},
    "the generic class": {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "<mask>"},
    "transformers 5's generic class": {"tokenizer_class": "TokenizersBackend"},
    "another class": {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "pad_token": None},
    "an old class": {"tokenizer_class": "RobertaTokenizerFast"},
    "tokens as objects": {"bos_token": token("<s>"), "mask_token": token("<mask>", normalized=False)},
    "tokens that it does not have": {"mask_token": "[MASK]", "extra_special_tokens": ["<new>"]},
    "a few tokens": {"added_tokens_decoder": {"0": token("<s>") | {"special": True}}, "bos_token": "<s>"},
    "another prefix than training's": {"add_prefix_space": True},
    "a class of the user's own": {"auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]}},
}
SPLIT_DIGITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
CONTENTS = {
    "plain": {},
    "no processor": {"post_processor": None},
    "GPT-2's processor": {
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    },
    "no added tokens": {"added_tokens": []},
    "tokens that are not special": {"added_tokens": added(special=False)},
    "a further token": {"added_tokens": [*added(), added()[0] | {"id": 400, "content": "<entity>"}]},
    "truncation": {"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}},
    "a prefix": {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    },
}
OTHER_KINDS = {"a normalizer": {"normalizer": {"type": "NFC"}}, "digits apart": {"pre_tokenizer": SPLIT_DIGITS}}


def assert_opens(folder, source, expected_class):
    """Check that `AutoTokenizer` opens the folder as the tokenizer that training uses."""
    check_tokenizer(folder, source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer).__name__ == expected_class
    ids = {name: getattr(tokenizer, f"{name}_id") for name in (*SPECIAL_TOKENS, "mask_token")}
    assert ids == {**SPECIAL_TOKENS, "mask_token": 399}
    expected, word = (training_tokenizer(source).encode(text, add_special_tokens=False).ids for text in (TEXT, "kato"))
    assert tokenizer(TEXT)["input_ids"] == [0, *expected, 2]
    assert tokenizer("kato <mask>")["input_ids"] == [*tokenizer("kato")["input_ids"][:-1], 399, 2]
    batch = tokenizer(["kato", TEXT], padding=True)
    assert batch["input_ids"][0].count(1) == batch["attention_mask"][0].count(0) == len(expected) - len(word)
    return tokenizer


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_any_config_is_completed(make, tmp_path, config):
    source = make({"tokenizer_config.json": config})
    write_tokenizer(source, tmp_path / "written")
    tokenizer = assert_opens(tmp_path / "written", source, "RobertaTokenizer")
    assert tokenizer.model_max_length == 512
    assert len(tokenizer) == 400
    assert json.loads((tmp_path / "written/tokenizer_config.json").read_text())["mask_token"] == "<mask>"


@pytest.mark.parametrize("changes", CONTENTS.values(), ids=CONTENTS)
def test_any_tokenizer_json_is_completed(make, tmp_path, changes):
    source = make(**changes)
    write_tokenizer(source, tmp_path / "written", 48)
    tokenizer = assert_opens(tmp_path / "written", source, "RobertaTokenizer")
    assert tokenizer.model_max_length == 48
    assert TokenizerInfo.read(tmp_path / "written").fingerprint == TokenizerInfo.read(source).fingerprint
    pair = tokenizer("kato", "miren", return_offsets_mapping=True)
    assert [pair["input_ids"].count(number) for number in (0, 2)] == [1, 3]


@pytest.mark.parametrize("changes", OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_what_robertas_class_would_lose_is_opened_by_the_generic_one(make, tmp_path, changes):
    source = make({"tokenizer_config.json": {"tokenizer_class": "RobertaTokenizer"}}, **changes)
    write_tokenizer(source, tmp_path / "written")
    tokenizer = assert_opens(tmp_path / "written", source, "TokenizersBackend")
    assert tokenizer("A\u030a 12")["input_ids"] == [
        0,
        *training_tokenizer(source).encode("A\u030a 12", add_special_tokens=False).ids,
        2,
    ]


def test_settings_that_change_no_id_are_kept(make, tmp_path):
    source = make({"tokenizer_config.json": {"truncation_side": "left", "padding_side": "up", "model_max_length": 99}})
    write_tokenizer(source, tmp_path / "written")
    written = json.loads((tmp_path / "written/tokenizer_config.json").read_text())
    assert (written["truncation_side"], written.get("padding_side"), written["model_max_length"]) == ("left", None, 99)


def test_a_folder_without_unk_gets_none(make, tokenizer_folder, tmp_path):
    model = json.loads((tokenizer_folder / "tokenizer.json").read_text())["model"]
    vocabulary = {("x" if name == "<unk>" else name): number for name, number in model["vocab"].items() if name != "x"}
    tokens = [entry for entry in added() if entry["content"] != "<unk>"]
    merges = [pair for pair in model["merges"] if all("x" not in piece for piece in pair)]
    source = make(model={**model, "vocab": vocabulary, "merges": merges}, added_tokens=tokens)
    write_tokenizer(source, tmp_path / "written")
    check_tokenizer(tmp_path / "written", source)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "written").unk_token is None


def test_vocabulary_and_merges_alone_open_as_transformers_opens_them(tokenizer_folder, tmp_path):
    model = json.loads((tokenizer_folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in model["merges"]))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<b>": 401, "<a>": 400}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": True, "padding_side": "left"}))
    ours = open_tokenizer(tmp_path)
    assert ours.padding_side == "right"
    theirs = transformers.RobertaTokenizer.from_pretrained(tmp_path)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours(f"{TEXT} <b><mask>") == theirs(f"{TEXT} <b><mask>")
    assert ours.name_or_path == str(tmp_path)


def without_mask(folder):
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 512}')


def with_another_prefix(folder):
    change_json(folder / "tokenizer_config.json", add_prefix_space=True)


def with_another_mask(folder):
    change_json(folder / "tokenizer_config.json", mask_token="<unk>")


def with_fewer_merges(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-100]
    path.write_text(json.dumps(content))


def with_a_further_token(folder):
    change_json(folder / "tokenizer_config.json", additional_special_tokens=["<new>"])


def damaged(folder):
    (folder / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (without_mask, "its class is TokenizersBackend, not RobertaTokenizer"),
        (with_another_prefix, "has other ids"),
        (with_another_mask, "mask_token is .'<unk>', 3., not .'<mask>', 399."),
        (with_fewer_merges, "has other ids"),
        (with_a_further_token, "another vocabulary"),
        (damaged, "JSONDecodeError"),
    ],
)
def test_a_folder_that_opens_as_another_tokenizer_is_refused(tokenizer_folder, tmp_path, change, difference):
    write_tokenizer(tokenizer_folder, tmp_path)
    check_tokenizer(tmp_path, tokenizer_folder)
    change(tmp_path)
    with pytest.raises(UserError, match=rf"does not open .* as training uses it \(.*{difference}.*: nothing was"):
        check_tokenizer(tmp_path, tokenizer_folder)


@pytest.mark.parametrize(
    ("stated", "length"),
    [
        ("{}", None),
        ('{"model_max_length": null}', None),
        ('{"model_max_length": Infinity}', None),
        ('{"model_max_length": 1e30}', None),
        (f'{{"model_max_length": {int(1e30)}}}', None),
        ('{"model_max_length": 128.0}', 128),
    ],
)
def test_a_length_that_is_no_limit(tmp_path, stated, length):
    (tmp_path / "tokenizer_config.json").write_text(stated)
    assert stated_length(tmp_path) == length


@pytest.mark.parametrize("stated", ["0", "-1", "NaN", '"64"', "true", "[1]"])
def test_a_length_that_is_none_is_refused(tmp_path, stated):
    (tmp_path / "tokenizer_config.json").write_text(f'{{"model_max_length": {stated}}}')
    with pytest.raises(UserError, match=r"has the model_max_length .*: it must be a number of tokens"):
        stated_length(tmp_path)


@pytest.mark.parametrize("damage", ["{", "[]", "1", '"text"', "[1]"])
def test_a_damaged_config_is_refused(tmp_path, tokenizer_folder, damage):
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(damage)
    with pytest.raises(UserError, match=r"tokenizer_config.json' (is not a JSON object|cannot be read)"):
        open_tokenizer(tmp_path)


WRONG = {
    "added tokens that are no list": {"added_tokens": 1},
    "an added token that is no object": {"added_tokens": ["<s>"]},
    "an added token without a text": {"added_tokens": [{"id": 0}]},
    "an added token without an id": {"added_tokens": [{"content": "<s>"}]},
    "a step that is a text": {"pre_tokenizer": "ByteLevel"},
    "a step in a step": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, None]}},
    "a processor that is true": {"post_processor": True},
    "an id that is a text": {"model": {"type": "BPE", "merges": [], "vocab": {"a": "1"}}},
    "a negative id": {"model": {"type": "BPE", "merges": [], "vocab": {"a": -1}}},
    "an id for which no table has room": {"model": {"type": "BPE", "merges": [], "vocab": {"a": 1 << 31}}},
    "merges that are no list": {"model": {"type": "BPE", "merges": 3, "vocab": {"a": 1}}},
    "a merge of one": {"model": {"type": "BPE", "merges": [["a"]], "vocab": {"a": 1}}},
    "a merge of three": {"model": {"type": "BPE", "merges": ["a a a"], "vocab": {"a": 1, "aa": 2}}},
    "a merge of what is no token": {"model": {"type": "BPE", "merges": [["a", "b"]], "vocab": {"a": 1, "ab": 2}}},
    "a merge that makes no token": {"model": {"type": "BPE", "merges": [["a", "a"]], "vocab": {"a": 1}}},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_values_of_another_type_are_refused(make, tmp_path, changes):
    folder = make(**changes)
    with pytest.raises(UserError, match=r"tokenizer.json' is not a byte-level BPE .*: copy it again"):
        tokenizer_content(folder)


def test_a_token_with_two_ids_is_refused(make):
    tokens = [{**each, "id": 398} if each["content"] == "<mask>" else each for each in added()]
    with pytest.raises(UserError, match=r"gives <mask> the ids 399 and 398"):
        TokenizerInfo.read(make(added_tokens=tokens))


def test_a_tokenizer_without_merges_may_say_null(make, tokenizer_folder):
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    assert TokenizerInfo.read(make(model={**content["model"], "merges": None})).vocab_size == 400


def test_tokens_with_a_prefix_are_refused(make, tokenizer_folder):
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    with pytest.raises(UserError, match="but has tokens with the prefix '##'"):
        tokenizer_content(make(model={**content["model"], "continuing_subword_prefix": "##"}))


@pytest.mark.parametrize("vocabulary", [{"<s>": None}, {"<s>": 1 << 31}, {"<s>": 1.5}, {"<s>": True}])
def test_ids_of_a_vocabulary_alone_are_checked(tmp_path, vocabulary):
    named = {name: number for number, name in enumerate(("<pad>", "</s>", "<unk>", "<mask>"))}
    (tmp_path / "vocab.json").write_text(json.dumps(named | vocabulary))
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match=r"vocab.json and merges.txt in .* cannot be read"):
        tokenizer_content(tmp_path)
