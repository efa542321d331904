import json

import numpy as np
import pytest

from ds_roberta.data.shards import TokenizerInfo
from ds_roberta.data.words import MAX_WORD_TOKENS, word_bounds, word_starts
from ds_roberta.errors import UserError


def bounds(begins, special):
    """Words of one row as (start, end) pairs."""
    return list(
        zip(*(x.tolist() for x in word_bounds(np.array([begins], bool), np.array([special], bool))), strict=True)
    )


def test_a_word_begins_with_a_space(tokenizer_folder):
    table = word_starts(tokenizer_folder, TokenizerInfo.read(tokenizer_folder).vocab_size)
    vocabulary = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert table.shape == (400,)
    assert 0 < table.sum() < 400
    for token, number in vocabulary.items():
        assert table[number] == (token[0] == "Ġ")


def test_a_tokenizer_without_marked_words_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "▁b": 1}}}))
    with pytest.raises(UserError, match=r"marks no beginnings of words.*use --masking token"):
        word_starts(tmp_path, 2)


def test_first_tokens_and_those_behind_special_ones_begin_words():
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
