"""Where sentences end."""

import random

import pytest

from preprocessing.sentences import sentences


@pytest.mark.parametrize(
    "expected",
    [
        ["He met Dr. Smith at 3.5 p.m. on Monday.", '"Stop!" he said.', "It was the U.S. Army, e.g. the 3rd."],
        ["J. R. Tolkien wrote.", "What?!", "Yes... maybe.", "It is I.", "And you."],
        ["“Is it?”", "“It is.”", "(So it seems.)", "See fig. 3 on p. 7."],
        ["Wohin?", "Über z.B. Berlin.", "¿Por qué?", "Да.", "यह है।", "फिर।"],
        ["3. The third point.", "4 more."],
    ],
)
def test_rules_end_sentences_inside_a_line(expected):
    assert sentences(" ".join(expected), "rules") == expected
    assert sentences("\n".join(expected), "rules") == expected
    assert sentences(" ".join(expected), "lines") == [" ".join(expected)]


def test_rules_lose_no_text_and_take_linear_time():
    generator = random.Random(1)
    alphabet = [*"aB. !?\"'()…。\u2028\u0085\x00😀é–—«»[]1:,\t \n", "Dr.", "U.S.", "\u200b", "\u0301"]
    for _ in range(3000):
        text = "".join(generator.choices(alphabet, k=generator.randint(0, 60)))
        found = sentences(text, "rules")
        assert " ".join(found).split() == text.split()
        assert all(found)
        assert found == [sentence.rstrip() for sentence in found]
    for text in ("." * 300_000, ". " * 100_000, '."' * 100_000, "A" * 300_000 + ".", " " * 300_000 + "x"):
        assert "".join(sentences(text, "rules")).replace(" ", "") == text.replace(" ", "")
