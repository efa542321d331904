"""Where sentences end."""

import random
import re
import unicodedata

import pytest
import regex

from preprocessing.tokens import sentence_splitting as module
from preprocessing.tokens.sentence_splitting import sentence_bytes, tokenizer_lines


def sentences(text, kind):
    document = sentence_bytes(text, kind).decode()
    return re.split("[\n\r]", document) if document else []


@pytest.mark.parametrize(
    "expected",
    [
        ["He met Dr. Smith at 3.5 p.m. on Monday.", '"Stop!" he said.', "It was the U.S. Army, e.g. the 3rd."],
        ["J. R. Tolkien wrote.", "What?!", "Yes... maybe.", "It is I.", "And you."],
        ["“Is it?”", "“It is.”", "(So it seems.)", "See fig. 3 on p. 7."],
        ["Wohin?", "Über z.B. Berlin.", "¿Por qué?", "Да.", "यह है।", "फिर।"],
        ["3. The third point.", "4 more."],
        ["Er kam am 3. Oktober, d. h. Dienstag.", "Der 2. Weltkrieg endete 1945.", "Na und?"],
        ["Psal se 19. listopad.", "Bylo to v roce 1989.", "Konec."],
    ],
)
def test_rules_end_sentences_inside_a_line(expected):
    assert sentences(" ".join(expected), "rules") == expected
    assert sentences("\n".join(expected), "rules") == expected
    assert sentences(" ".join(expected), "lines") == [" ".join(expected)]


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (
            "",
            [
                "今天天气很好。",
                "你去北京吗？",
                "“太好了！”",
                "他说：“走吧，朋友。”",
                "（完。）",
                "我们走。。。",
                "真的？！",
                "iPad也好。",
            ],
        ),
        ("", ["今日は晴れです。", "「行くよ！」", "本当ですか？", "はい｡", "３．５と3.5は同じです。", "終わり"]),
        ("", ["我喜欢他.", "你呢?", "很好!!", "「是的.」", "他用Node.js的3.5版．", "完"]),  # the marks of Latin text
        (" ", ["오늘은 날씨가 좋다.", "정말? ", "네!"]),
        (" ", ["დღეს კარგი ამინდია.", "სად მიდიხარ?", "სახლში.", "კარგი!"]),  # Georgian, of which islower() is true
        (" ", ["آج موسم اچھا ہے۔", "آپ کہاں جا رہے ہیں؟", "گھر۔"]),
        ("", ["آج موسم اچھا ہے۔", "گھر۔"]),
        (" ", ["Այսօր լավ եղանակ է։", "Ո՞ւր ես գնում։", "տուն։"]),
        (" ", ["ዛሬ አየሩ ጥሩ ነው።", "ወዴት ትሄዳለህ፧", "ቤት።"]),
        ("", ["ថ្ងៃនេះអាកាសធាតុល្អ។", "អ្នកទៅណា៕", "ផ្ទះ។"]),
        (" ", ["ဒီနေ့ ရာသီဥတု ကောင်းတယ်။", "ဘယ်သွားမလဲ။"]),
        (" ", ["आज मौसम अच्छा है।", "तुम कहाँ जा रहे हो?", "घर॥"]),
        (" ", ["আজ আবহাওয়া ভালো।", "তুমি কোথায় যাচ্ছ?"]),
        (" ", ["اليوم الطقس جميل.", "إلى أين تذهب؟", "إلى البيت!"]),
        (" ", ["היום מזג האוויר נאה.", "לאן אתה הולך?"]),
        (" ", ["ᠡᠨᠡ ᠡᠳᠦᠷ᠃", "ᠰᠠᠶᠢᠨ᠃"]),
        (" ", ["Σήμερα είναι καλά.", "Πού πας!", "Сегодня хорошо.", "Куда?"]),
    ],
)
def test_rules_know_the_marks_of_many_scripts(between, expected):
    expected = [sentence.strip() for sentence in expected]
    assert sentences(between.join(expected), "rules") == expected


@pytest.mark.parametrize(
    "text",
    [
        "วันนี้อากาศดี เราไปเที่ยวกัน",  # Thai writes no ends of sentences
        "「はい。」、と。）",  # no end before what goes on, nor before a closing mark
        "约3.5米，见www.例子.com和A.B",
        "我……不知道",
    ],
)
def test_rules_find_no_end_where_there_is_none(text):
    assert sentences(text, "rules") == [text]


def test_the_marks_are_those_of_unicode():
    characters = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x20000)]))
    ours = set(re.findall(f"[{module._TERMINALS}]", characters))
    unicodes = set(regex.findall(r"\p{Sentence_Terminal}", characters)) - set(".!?\u2024\ufe52\uff0e")
    assert ours - unicodes <= set("\u2e60\u2e61")  # which regex knows since 2026.11
    assert all(unicodedata.category(character) == "Cn" for character in unicodes - ours)  # of a later Unicode
    assert set(regex.findall(r"\p{SB=SContinue}", characters)) > module._CONTINUING


def test_the_tokenizer_sees_a_space_only_where_the_text_has_white_space():
    document = sentence_bytes("今天。你好！ 好。\n\n \t完。是", "rules")
    assert document == "今天。\r你好！\n好。\n \t完。\r是".encode()
    assert tokenizer_lines(document).decode() == "今天。\n你好！\n 好。\n  \t完。\n是"


def test_rules_lose_no_text_and_take_linear_time():
    generator = random.Random(1)
    alphabet = [
        *"aB. !?\"'()…。\u2028\u0085\x00😀é–—«»[]1:,\t \n",
        "Dr.",
        "U.S.",
        "\u200b",
        "\u0301",
        "你",
        "．",
        "」",
        "，",
    ]
    for _ in range(1000):
        text = "".join(generator.choices(alphabet, k=generator.randint(0, 60)))
        found = sentences(text, "rules")
        assert (
            tokenizer_lines(sentence_bytes(text or " ", "rules")).replace(b"\n", b"").decode().split() == text.split()
        )
        assert all(found)
        assert found == [sentence.rstrip() for sentence in found]
    long = ["." * 300_000, ". " * 100_000, '."' * 100_000, "A" * 300_000 + ".", " " * 300_000 + "x"]
    for text in [*long, "。" * 300_000, "。」" * 100_000, "你." * 100_000, "你" + ".”" * 100_000, "…" * 300_000 + "。"]:
        assert "".join(sentences(text, "rules")).replace(" ", "") == text.replace(" ", "")
