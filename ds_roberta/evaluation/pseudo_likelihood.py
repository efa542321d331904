"""Pseudo-log-likelihood of sentences under a masked language model.

Each token is masked in turn and its log-probability taken; their sum is the sentence's score (Salazar et al. 2020,
"Masked Language Model Scoring", section 2). `within_word_l2r` also masks the later tokens of the token's word, since
the rest of a word gives it away (Kauf & Ivanova 2023, "A Better Way to Do Masked Language Model Scoring", section 2).

A sentence of N tokens becomes N masked copies. Copies of many sentences, sorted by length, fill batches with about the
same number of tokens, few of which are padding.

Shapes: B masked copies, T tokens a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import regex
import tokenizers
import torch

from ds_roberta.data.tokenizer import TokenizerInfo
from ds_roberta.data.words import UNSPACED
from ds_roberta.evaluation.roberta_folder import RobertaFolder
from ds_roberta.progress import progress_bar

METRICS = ("original", "within_word_l2r")
_JOINED = regex.compile(r"[\p{M}\u200c\u200d]\w|.[\p{M}\u200c\u200d]")
"""Two characters of one word, of which one is a mark or a joiner."""
BATCH_TOKENS = 4096
"""The default maximum number of tokens in a batch, padding included."""


@dataclass(frozen=True)
class Sentence:
    """A sentence's token ids, without `<s>` and `</s>`, and the number of each token's word."""

    ids: tuple[int, ...]
    words: tuple[int, ...]


@dataclass(frozen=True)
class MaskedCopies:
    """A batch of masked copies of sentences.

    Attributes:
        sentences: (B,) int64, the sentence that each row is a copy of.
        input_ids: (B, T) int64, padded on the right.
        columns: (B,) int64, the position of the token to predict in its row.
        labels: (B,) int64, its id.
    """

    sentences: np.ndarray
    input_ids: np.ndarray
    columns: np.ndarray
    labels: np.ndarray


def encode(folder: RobertaFolder, texts: Sequence[str]) -> list[Sentence]:
    """Encode texts; their words are the parts that the tokenizer's pre-tokenizer splits them into.

    Some pre-tokenizers split at combining marks, and none splits scripts without spaces: marks and what follows them
    stay with the word here, and characters of such scripts are words.
    """
    encodings = folder.tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [
        Sentence(tuple(encoding.ids), _words(text, encoding)) for text, encoding in zip(texts, encodings, strict=True)
    ]


def _words(text: str, encoding: tokenizers.Encoding) -> tuple[int, ...]:
    """The number of each token's word."""
    words: list[int] = []
    end, last_part, is_blank = 0, None, False
    for part, (first, last) in zip(encoding.word_ids, encoding.offsets, strict=True):
        first += len(text[first:last]) - len(text[first:last].lstrip())  # SentencePiece's pieces begin with a space
        begins = part != last_part and not (first == end and _JOINED.match(text[max(0, first - 1) : first + 1]))
        is_inside = first < end  # a byte of a character that the token before began
        begins = not is_inside and not is_blank and (begins or UNSPACED.match(text, first) is not None)
        words.append(words[-1] + begins if words else 0)
        end, last_part, is_blank = last, part, first >= last  # a space belongs to the word after it
    return tuple(words)


def pseudo_log_likelihoods(
    folder: RobertaFolder, sentences: Sequence[Sentence], metric: str = "original", batch_tokens: int = BATCH_TOKENS
) -> np.ndarray:
    """The score of each sentence, in nats: (sentences,) float64; equal sentences have equal scores.

    Args:
        sentences: none longer than `folder.max_positions` with its two special tokens.
        metric: one of `METRICS`.
        batch_tokens: the maximum number of tokens in a batch, unless a single row has more.
    """
    different = list(dict.fromkeys(sentences))
    scores = np.zeros(len(different))
    total = sum(
        len(sentence.ids) * (len(sentence.ids) + 2) for sentence in different
    )  # the time is in proportion to these
    with progress_bar(total=total, unit="token", unit_scale=True, delay=0.5) as progress:
        for batch in masked_copies(different, folder.special, metric, batch_tokens):
            rows, length = batch.input_ids.shape
            is_token = torch.from_numpy(batch.input_ids != folder.special.pad_token_id)
            log_likelihoods = folder.log_likelihoods(
                torch.from_numpy(batch.input_ids),
                None if bool(is_token.all()) else is_token,
                torch.from_numpy(np.arange(rows) * length + batch.columns),
                torch.from_numpy(batch.labels),
            )
            np.add.at(scores, batch.sentences, log_likelihoods.double().numpy())
            progress.update(int(is_token.sum()))
    number = {sentence: index for index, sentence in enumerate(different)}
    return scores[[number[sentence] for sentence in sentences]]


def masked_copies(
    sentences: Sequence[Sentence], special: TokenizerInfo, metric: str, batch_tokens: int
) -> Iterator[MaskedCopies]:
    """Batches with a masked copy for each token, longest first, so that too large a batch fails at once."""
    by_length = sorted(range(len(sentences)), key=lambda index: -len(sentences[index].ids))
    copies = [(index, token) for index in by_length for token in range(len(sentences[index].ids))]
    first = 0
    while first < len(copies):
        length = len(sentences[copies[first][0]].ids) + 2
        batch = copies[first : first + max(1, batch_tokens // length)]
        first += len(batch)
        input_ids = np.full((len(batch), length), special.pad_token_id, dtype=np.int64)
        labels = np.empty(len(batch), dtype=np.int64)
        for row, (index, token) in enumerate(batch):
            sentence = sentences[index]
            input_ids[row, : len(sentence.ids) + 2] = special.bos_token_id, *sentence.ids, special.eos_token_id
            end = token + 1
            if metric == "within_word_l2r":
                while end < len(sentence.ids) and sentence.words[end] == sentence.words[token]:
                    end += 1
            input_ids[row, 1 + token : 1 + end] = special.mask_token_id
            labels[row] = sentence.ids[token]
        numbers = np.array(batch)
        yield MaskedCopies(numbers[:, 0], input_ids, numbers[:, 1] + 1, labels)
