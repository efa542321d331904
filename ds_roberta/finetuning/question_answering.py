"""Extractive question answering: the span of a context that answers a question, or none.

A context becomes windows of token ids, and an answer their labels; the windows' logits become spans of the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional

from ds_roberta.errors import UserError
from ds_roberta.finetuning.error_analysis import example, worst_examples
from ds_roberta.finetuning.labelled_tables import SUFFIXES, Splitting, read_splits
from ds_roberta.finetuning.squad import Question, is_unanswered, read_questions
from ds_roberta.finetuning.squad_metrics import squad_v1_metrics, squad_v2_metrics
from ds_roberta.finetuning.task import (
    COMMAND_LINE,
    RESULTS,
    Answer,
    Encoded,
    Task,
    label_head,
    log_softmax,
    one_line,
    softmax,
)
from ds_roberta.options import option, require_positive, require_share
from ds_roberta.process import logger

NO_ANSWER = "no answer"
MAX_QUESTION_TOKENS = 64  # as in BERT's run_squad.py (Devlin et al. 2019)
_CONTEXTS_AT_ONCE = 1000  # a tokenizer's own results need far more memory than what is kept


@dataclass(frozen=True)
class SpanOptions(Splitting):
    """Question answering; the defaults are those of BERT's run_squad.py.

    Attributes:
        n_best_size: candidates for the answer to a question.
    """

    doc_stride: int = option(
        "tokens between the beginnings of a context's windows, at most half a window", 128, check=require_positive
    )
    max_answer_length: int = option("in tokens", 30, check=require_positive)
    no_answer_threshold: float = option(
        "for data with unanswerable questions: give no answer if its probability, against the best span, is above this",
        0.5,
        check=require_share,
    )
    n_best_size: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("n_best_size", self.n_best_size)


@dataclass(frozen=True)
class Window:
    """A question with a piece of its context: `<s> question </s></s> piece </s>`.

    Attributes:
        question: the question's index.
        first: position of the piece's first token in `input_ids`.
        offsets: (tokens, 2) int32, each of the piece's tokens as [start, end) in the context's characters, without
            surrounding white space; a token of only white space is empty.
    """

    question: int
    input_ids: list[int]
    first: int
    offsets: np.ndarray


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of the context; `score` is the sum of the logits of its first and last token."""

    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Decoded:
    """What the logits say about one question.

    Attributes:
        spans: the best spans, which do not overlap, the best first; empty if the context has no words.
        null_score: the lowest sum of the logits at `<s>` among the windows: "no answer" must hold in all of them.
    """

    spans: tuple[Span, ...]
    null_score: float

    @property
    def null_probability(self) -> float:
        """The probability of no answer, against the best span."""
        if not self.spans:
            return 1.0
        return float(softmax(np.array([self.null_score, self.spans[0].score]))[0])

    def probabilities(self, with_null: bool) -> list[float]:
        """Each span's share among the spans and, if it is allowed, the null answer."""
        scores = [span.score for span in self.spans] + [self.null_score] * with_null
        return softmax(np.array(scores))[: len(self.spans)].tolist() if scores else []


class QuestionAnswering(Task):
    """Finds the span of a context that answers a question.

    Attributes:
        with_null: whether "no answer" is a possible answer.
    """

    name = "question-answering"
    architecture = "RobertaForQuestionAnswering"
    options_class = SpanOptions
    takes_pairs = True

    def __init__(self, with_null: bool, options: SpanOptions):
        self.with_null, self.options = with_null, options
        self.head = label_head(["LABEL_0", "LABEL_1"])  # transformers' names of a head with two outputs
        self.results = {"question_answering": {"may_be_unanswerable": with_null, "options": asdict(options)}}
        self.metric_names = ("f1", "exact", "best_f1", "best_exact") if with_null else ("f1", "exact_match")

    @classmethod
    def from_data(
        cls, data: tuple[str, ...], options: SpanOptions
    ) -> tuple[QuestionAnswering, dict[str, Sequence[Question]]]:
        splits = read_splits(
            data,
            SUFFIXES,
            read_questions,
            validation_fraction=options.validation_fraction,
            groups=lambda questions: [question.context for question in questions],
            is_unlabelled=is_unanswered,
        )
        with_null = any(question.may_be_unanswerable for questions in splits.values() for question in questions)
        return cls(with_null, options), splits

    @classmethod
    def from_model(
        cls, config: transformers.RobertaConfig, results: dict[str, Any], given: dict[str, Any]
    ) -> QuestionAnswering:
        """Answers are chosen as in fine-tuning; with a threshold given, "no answer" is a possible answer."""
        stored = results.get("question_answering") or {}
        try:
            options = SpanOptions(**{**stored.get("options", {}), **given})
        except (AttributeError, TypeError) as error:
            raise UserError(
                f"{RESULTS} of the model has question_answering in an unknown form ({error}): fine-tune it again"
            ) from error
        return cls("no_answer_threshold" in given or bool(stored.get("may_be_unanswerable")), options)

    def read_inputs(self, path: str) -> list[Question]:
        return read_questions(path, labelled=False)

    def other_columns(self, given: Question) -> dict[str, Any]:
        return given.others

    def make_input(self, text: str, text_pair: str | None) -> Question:
        assert text_pair is not None
        return Question(COMMAND_LINE, "1", text_pair, text)

    def encode(
        self, tokenizer: transformers.PreTrainedTokenizerBase, inputs: Sequence[Question], max_seq_length: int
    ) -> Encoded:
        windows = make_windows(tokenizer, inputs, max_seq_length, self.options.doc_stride)
        features = [
            {
                "input_ids": window.input_ids,
                "attention_mask": [1] * len(window.input_ids),
                "labels": span_labels(window, inputs[window.question]),
            }
            for window in windows
        ]
        return Encoded(inputs, features, windows)

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The mean of the cross-entropies of start and end; see `Task.loss`.

        Args:
            outputs: with `start_logits` and `end_logits`, (B, T).
            labels: (B, 2), int64: the positions of an answer's first and last token.
        """
        logits = torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1).float()
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return loss / (labels.numel() if num_items_in_batch is None else num_items_in_batch)

    def metrics(self, encoded: Encoded, logits: Any) -> dict[str, Any]:
        decoded = self._decode(encoded, logits)
        golds = [question.answers for question in encoded.inputs]
        answers = [
            question.context[found.spans[0].start : found.spans[0].end] if found.spans else ""
            for question, found in zip(encoded.inputs, decoded, strict=True)
        ]
        if not self.with_null:
            return squad_v1_metrics(golds, answers)
        null_probabilities = [found.null_probability for found in decoded]
        return squad_v2_metrics(golds, answers, null_probabilities, self.options.no_answer_threshold)

    def error_analysis(self, encoded: Encoded, logits: Any) -> dict[str, Any]:
        """The worst questions, by the mean of their windows' losses."""
        losses: list[list[float]] = [[] for _ in encoded.inputs]
        for window, *scores in zip(encoded.windows, *logits, strict=True):
            question = encoded.inputs[window.question]
            of_window = [log_softmax(each[: len(window.input_ids)]) for each in scores]
            places = zip(of_window, span_labels(window, question), strict=True)
            losses[window.question].append(-float(np.mean([each[place] for each, place in places])))
        answers = self.answer(encoded, logits)
        return worst_examples(
            example(
                question.place,
                [question.question],
                question.answers[0] if question.answers else NO_ANSWER,
                answer.row["answer"] or NO_ANSWER,
                loss=float(np.mean(of_question)),
                predicted_probability=answer.row["score"],
            )
            for question, answer, of_question in zip(encoded.inputs, answers, losses, strict=True)
        )

    def answer(self, encoded: Encoded, logits: Any) -> list[Answer]:
        decoded = self._decode(encoded, logits)
        return [self._answer(question, found) for question, found in zip(encoded.inputs, decoded, strict=True)]

    def _decode(self, encoded: Encoded, logits: Any) -> list[Decoded]:
        starts, ends = logits
        of_question: list[list[int]] = [[] for _ in encoded.inputs]
        for index, window in enumerate(encoded.windows):
            of_question[window.question].append(index)
        return [
            decode(
                [encoded.windows[index] for index in indices],
                [starts[index] for index in indices],
                [ends[index] for index in indices],
                self.options,
            )
            for indices in of_question
        ]

    def _answer(self, question: Question, decoded: Decoded) -> Answer:
        candidates = [
            {"text": question.context[span.start : span.end], "start": span.start, "end": span.end, "score": score}
            for span, score in zip(decoded.spans, decoded.probabilities(self.with_null), strict=True)
        ]
        no_answer = decoded.null_probability
        unanswered = not candidates or (self.with_null and no_answer > self.options.no_answer_threshold)
        best = {"text": "", "start": None, "end": None, "score": no_answer} if unanswered else candidates[0]
        row = {"id": question.id, "question": question.question, "context": question.context, "answer": best["text"]}
        row |= {key: best[key] for key in ("start", "end", "score")}
        if self.with_null:
            row |= {"no_answer_probability": no_answer, "best_answer": candidates[0]["text"] if candidates else ""}
        place = f"{best['text']!r} (characters {best['start']} to {best['end']})"
        line = f"  {NO_ANSWER if unanswered else place} {best['score']:.4f}"
        return Answer([f"{question.id}: {one_line(question.question)}", line], {**row, "candidates": candidates})


def make_windows(
    tokenizer: transformers.PreTrainedTokenizerBase, questions: Sequence[Question], max_seq_length: int, doc_stride: int
) -> list[Window]:
    """Windows over each question's context, in order.

    A question is cut to `MAX_QUESTION_TOKENS` or half of a window; a warning counts those and names the first.

    Raises:
        UserError: a question leaves no room for its context.
    """
    longest = min(MAX_QUESTION_TOKENS, max_seq_length // 2)
    asked = _encode(tokenizer, [question.question.strip() for question in questions])
    cut = [question for question, (ids, _) in zip(questions, asked, strict=True) if len(ids) > longest]
    if cut:
        logger.warning(f"{len(cut)} of {len(questions)} questions are too long and were cut, first {cut[0].place}")
    contexts = _located_tokens(tokenizer, list(dict.fromkeys(question.context for question in questions)))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    windows = []
    for index, (question, (question_ids, _)) in enumerate(zip(questions, asked, strict=True)):
        ids, offsets = contexts[question.context]
        head = [bos, *question_ids[:longest], eos, eos]
        room = max_seq_length - len(head) - 1
        if room < 1:
            raise UserError(
                f"{question.place}: {max_seq_length} tokens leave no room for the context after the question: raise "
                "--max_seq_length"
            )
        for start in window_starts(len(ids), room, doc_stride):
            piece = slice(start, start + room)
            windows.append(Window(index, [*head, *ids[piece], eos], len(head), offsets[piece]))
    return windows


def window_starts(tokens: int, room: int, doc_stride: int) -> list[int]:
    """Where windows of `room` tokens begin: at multiples of the stride, until one reaches the end."""
    stride = min(doc_stride, max(room // 2, 1))
    return [0, *range(stride, tokens - room + stride, stride)] if tokens > room else [0]


def span_labels(window: Window, question: Question) -> tuple[int, int]:
    """Positions of the first and last token of the question's first answer; (0, 0), which is `<s>`, if the window
    does not hold all of it."""
    if question.start is None:
        return 0, 0
    start, end = _without_space(question.context, question.start, question.start + len(question.answers[0]))
    begins, stops = window.offsets.T
    inside = np.flatnonzero((begins < stops) & (begins < end) & (stops > start))
    if not len(inside) or begins[inside[0]] > start or stops[inside[-1]] < end:
        return 0, 0
    return window.first + int(inside[0]), window.first + int(inside[-1])


def decode(
    windows: Sequence[Window],
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    options: SpanOptions,
) -> Decoded:
    """The best spans of one question from its windows' logits, each (T,), T at least the window's length."""
    null_score = math.inf
    found: list[Span] = []
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        null_score = min(null_score, float(starts[0]) + float(ends[0]))
        piece = slice(window.first, window.first + len(window.offsets))
        found += _best_of_window(window, starts[piece], ends[piece], options)
    chosen: list[Span] = []
    for span in sorted(found, key=lambda span: (-span.score, span.start, span.end)):
        apart = all(span.end <= other.start or span.start >= other.end for other in chosen)
        if apart and len(chosen) < options.n_best_size:
            chosen.append(span)
    return Decoded(tuple(chosen), null_score)


def _best_of_window(window: Window, starts: np.ndarray, ends: np.ndarray, options: SpanOptions) -> list[Span]:
    """The window's best spans, which do not overlap: the best, the best of the rest, and so on."""
    tokens = len(window.offsets)
    places = np.arange(tokens)
    empty = window.offsets[:, 0] == window.offsets[:, 1]
    starts = np.where(empty, -np.inf, starts.astype(np.float64))
    ends = np.where(empty, -np.inf, ends.astype(np.float64))
    longest = min(options.max_answer_length, tokens)
    last = places[:, None] + np.arange(longest)  # (tokens, length - 1)
    scores = np.where(last < tokens, starts[:, None] + ends[np.minimum(last, tokens - 1)], -np.inf)
    spans: list[Span] = []
    while len(spans) < options.n_best_size and scores.size:
        first, more = np.unravel_index(scores.argmax(), scores.shape)
        score = float(scores[first, more])
        if score == -math.inf:
            break
        spans.append(Span(int(window.offsets[first, 0]), int(window.offsets[first + more, 1]), score))
        scores[(places[:, None] <= first + more) & (last >= first)] = -np.inf
    return spans


def _located_tokens(
    tokenizer: transformers.PreTrainedTokenizerBase, contexts: Sequence[str]
) -> dict[str, tuple[list[int], np.ndarray]]:
    """Each context's ids and its tokens' places, as in `Window.offsets`; many questions share a context."""
    located = {}
    for first in range(0, len(contexts), _CONTEXTS_AT_ONCE):
        texts = contexts[first : first + _CONTEXTS_AT_ONCE]
        for text, (ids, offsets) in zip(texts, _encode(tokenizer, texts), strict=True):
            places = [_without_space(text, *offset) for offset in offsets]
            located[text] = (ids, np.array(places, dtype=np.int32).reshape(-1, 2))
    return located


def _encode(
    tokenizer: transformers.PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Each text's ids and offsets, without special tokens and without a limit."""
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        split_special_tokens=True,
        verbose=False,
    )
    return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


def _without_space(text: str, start: int, end: int) -> tuple[int, int]:
    """[start, end) without white space at its ends: RoBERTa's tokens begin with the space before the word."""
    piece = text[start:end]
    start += len(piece) - len(piece.lstrip())
    return start, start + len(piece.strip())
