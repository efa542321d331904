import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from ds_roberta.data.tokenizer import TokenizerInfo, token_bytes
from ds_roberta.data.words import MAX_WORD_TOKENS, share_without_spaces, word_bounds, word_flags
from ds_roberta.errors import UserError
from preprocessing.tokens.bpe import train_bpe


def bounds(begins, special):
    """Words of one row as (start, end) pairs."""
    return list(
        zip(*(x.tolist() for x in word_bounds(np.array([begins], bool), np.array([special], bool))), strict=True)
    )


def test_a_word_begins_with_a_space(tokenizer_folder):
    table = word_flags(tokenizer_folder, TokenizerInfo.read(tokenizer_folder).vocab_size)
    vocabulary = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert table.shape == (400,)
    assert 0 < (table & 1).sum() < 400
    for token, number in vocabulary.items():
        assert table[number] & 1 == (token[0] == "Ġ")


def test_a_tokenizer_without_marked_words_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "▁b": 1}, "merges": []}}))
    with pytest.raises(UserError, match=r"does not mark where words begin.*use --masking token"):
        word_flags(tmp_path, 2)


def test_first_tokens_and_those_after_special_ones_begin_words():
    #         <s>      word   word      </s>     word      </s>
    special = [1, 0, 0, 0, 0, 0, 1, 0, 0, 1]
    begins = [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert bounds(begins, special) == [(0, 1), (1, 3), (3, 6), (6, 7), (7, 9), (9, 10)]
    assert bounds([0, 0, 1], [0, 0, 0]) == [(0, 2), (2, 3)]


def test_words_end_with_their_row():
    starts, ends = word_bounds(np.zeros((3, 4), bool), np.zeros((3, 4), bool))
    assert starts.tolist() == [0, 4, 8]
    assert ends.tolist() == [4, 8, 12]


def test_runs_without_a_space_are_cut():
    length = 2 * MAX_WORD_TOKENS + 3
    assert bounds([1] + [0] * (length - 1) + [1, 0], [0] * (length + 2)) == [
        (0, MAX_WORD_TOKENS),
        (MAX_WORD_TOKENS, 2 * MAX_WORD_TOKENS),
        (2 * MAX_WORD_TOKENS, length),
        (length, length + 2),
    ]


TEXTS = {
    "Chinese": "我们今天去北京，看了《红楼梦》的电影。你喜欢COVID19吗？𠮷野家很好吃。",
    "Japanese": "私はカメラとコンピューターを買いました。らーめんが食べたい！がんばって。",
    "Thai": "วันนี้อากาศดีมาก เราไปเที่ยวที่ตลาดน้ำกับครู",
    "Khmer": "ថ្ងៃនេះអាកាសធាតុល្អណាស់។ យើងទៅផ្សារ",
    "Myanmar": "ဒီနေ့ရာသီဥတုကောင်းတယ်။ ကျွန်တော်ဈေးသွားမယ်",
    "Russian": "Достопримечательностиисельскохозяйственный день",
    "Hindi": "आजमौसमअच्छाहैहमबाज़ारजातेहैंऔरखानाखातेहैं पानी",
    "emoji": "yes 👩‍👩‍👧‍👦🇩🇪👍🏽👩‍👩‍👧‍👦🇩🇪👍🏽👩‍👩‍👧‍👦🇩🇪👍🏽 no",
    "English": "It's a café, naïve “words”—and an_address.example.com/with/many/parts/and/more/than/sixteen/pieces?x=1",
}


def units(folder, text):
    """The words of a text, as text."""
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    flags = word_flags(folder, TokenizerInfo.read(folder).vocab_size)[[ids]]
    pieces = token_bytes(folder)
    bounds = zip(*word_bounds(flags, np.zeros((1, len(ids)), bool)), strict=True)
    return [b"".join(pieces[id_] for id_ in ids[start:end]).decode() for start, end in bounds]


@pytest.fixture(scope="module")
def of_all_scripts(tmp_path_factory):
    """A tokenizer in which each character of these texts is a token; other characters become bytes."""
    folder = tmp_path_factory.mktemp("scripts")
    train_bpe(iter([list("".join(TEXTS.values()))] * 2), 1000, folder)
    return folder


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_no_word_is_cut_inside_a_character(tokenizer_folder, of_all_scripts, text):
    for folder in (tokenizer_folder, of_all_scripts):  # the first writes each byte as a token
        words = units(folder, text)  # decodes each, which fails for a part of a character
        assert "".join(words) == text
        assert max(map(len, words)) < 80


def test_characters_are_words_where_none_are_marked(tokenizer_folder, of_all_scripts):
    expected = ["我", "们", " 去", "北", "京", "，", "《", "红", "》", "COVID", "的", " yes", " no"]
    assert units(of_all_scripts, "".join(expected)) == expected
    # A tokenizer that knows no character of a script tells of some by their first byte what they are.
    assert units(tokenizer_folder, "我们 去ABC，《红》 no") == ["我", "们", " 去", "ABC，", "《", "红", "》", " no"]


def test_katakana_makes_words_and_marks_begin_none(of_all_scripts):
    expected = ["私", "は", "カメラ", "と", "コンピューター", "を", "らー", "め", "ん"]
    assert units(of_all_scripts, "".join(expected)) == expected
    assert units(of_all_scripts, "ดีที่น้ำ") == ["ดี", "ที่", "น้ำ"]
    assert units(of_all_scripts, "ကောင်းတယ်") == ["ကော", "င်း", "တ", "ယ်"]


@pytest.mark.parametrize("script", ["English", "Russian", "Hindi", "emoji"])
def test_where_spaces_mark_words_nothing_but_spaces_does(of_all_scripts, script):
    text = TEXTS[script]
    ids = Tokenizer.from_file(str(of_all_scripts / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    flags = word_flags(of_all_scripts, 1000)[[ids]]
    starts = word_bounds(flags, np.zeros((1, len(ids)), bool))[0].tolist()
    by_spaces = np.flatnonzero(np.append([True], (flags[0] & 1)[1:])).tolist()
    cuts = set(starts) - set(by_spaces)
    assert set(by_spaces) <= set(starts)
    for cut in cuts:  # of runs of more than 16 tokens alone, at the first beginning of a character before the 16th
        before = max(start for start in by_spaces if start < cut)
        back = -(cut - before) % MAX_WORD_TOKENS
        assert back <= 3
        assert (flags[0, cut : cut + back + 1] >= 128).tolist() == [False] + [True] * back
    assert script == "English" or cuts


def test_the_share_of_text_without_words_is_reported(tokenizer_folder):
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    for text, share in (("kato mi", 0.0), ("我们 ka", 0.5), ("ไป", 1.0), ("", 0.0)):
        ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, int)
        assert share_without_spaces(tokenizer_folder, np.append(ids, 399 + 1)) == share  # an added token's id
