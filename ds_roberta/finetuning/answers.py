"""What a fine-tuned model says about texts, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ds_roberta.distributed import logger
from ds_roberta.finetuning.entities import find_entities, make_word_windows, word_logits
from ds_roberta.finetuning.examples import Texts
from ds_roberta.finetuning.inference import FinetunedModel, logits
from ds_roberta.finetuning.model import encode
from ds_roberta.finetuning.spans import Decoded, SpanOptions, cut_questions, decode_all, make_windows
from ds_roberta.finetuning.squad import Question
from ds_roberta.finetuning.tagged_sentences import Sentence, are_of_entities


@dataclass(frozen=True)
class Answer:
    """
    Attributes:
        lines: for people.
        row: for programs.
    """

    lines: list[str]
    row: dict[str, Any]


def answer_texts(finetuned: FinetunedModel, texts: Texts, batch_size: int) -> list[Answer]:
    """Labels or numbers."""
    features = encode(finetuned.tokenizer, texts, finetuned.max_seq_length)
    found = logits(finetuned, [feature["input_ids"] for feature in features], batch_size)
    answers = []
    for index, (of_text,) in enumerate(found):
        asked = {"text": texts.firsts[index]}
        if texts.seconds is not None:
            asked["text_pair"] = texts.seconds[index]
        heading = " | ".join(_one_line(text) for text in asked.values())
        if finetuned.task == "regression":
            value = float(of_text[0])
            answers.append(Answer([heading, f"  {value:.4f}"], {**asked, "value": value}))
        else:
            scores = dict(zip(finetuned.names, map(float, softmax(of_text)), strict=True))
            ranked = sorted(scores, key=lambda name: -scores[name])
            line = "  " + ", ".join(f"{name} {scores[name]:.4f}" for name in ranked[:5])
            row = {**asked, "label": ranked[0], "score": scores[ranked[0]], "scores": scores}
            answers.append(Answer([heading, line], row))
    return answers


def answer_sentences(finetuned: FinetunedModel, sentences: Sequence[Sentence], batch_size: int) -> list[Answer]:
    """Entities with their texts and places: characters of the text where there is one, else words. Where the model's
    tags mark no entities, each word's tag."""
    of_entities = are_of_entities(finetuned.names)
    windows = make_word_windows(finetuned.tokenizer, sentences, finetuned.max_seq_length)
    of_windows = [found for (found,) in logits(finetuned, [window.input_ids for window in windows], batch_size)]
    answers = []
    for sentence, of_words in zip(sentences, word_logits(windows, of_windows, len(sentences)), strict=True):
        tags = [finetuned.names[index] for index in of_words.argmax(-1)]
        scores = softmax(of_words).max(-1)
        heading = _one_line(sentence.text or " ".join(sentence.words))
        asked = {"words": sentence.words} if sentence.text is None else {"text": sentence.text, "words": sentence.words}
        if of_entities:
            entities = [
                _entity(sentence, entity.start, entity.end) | {"type": entity.type, "score": entity.score}
                for entity in find_entities(tags, scores)
            ]
            lines = [f"  {each['type']}: {each['text']!r} {_place(each)} {each['score']:.4f}" for each in entities]
            found: dict[str, Any] = {"entities": entities}
        else:
            lines = ["  " + " ".join(f"{word}/{tag}" for word, tag in zip(sentence.words, tags, strict=True))]
            found = {"scores": scores.tolist()}
        answers.append(Answer([heading, *(lines or ["  no entities"])], {**asked, "tags": tags, **found}))
    return answers


def answer_questions(
    finetuned: FinetunedModel,
    questions: Sequence[Question],
    options: SpanOptions,
    with_null: bool,
    batch_size: int,
) -> list[Answer]:
    """Spans of the contexts.

    Args:
        with_null: whether "no answer" is an answer.
    """
    cut = cut_questions(finetuned.tokenizer, questions, finetuned.max_seq_length)
    if cut:
        logger.warning(f"{len(cut)} of {len(questions)} questions are cut as too long, first {questions[cut[0]].place}")
    windows = make_windows(finetuned.tokenizer, questions, finetuned.max_seq_length, options.doc_stride)
    found = logits(finetuned, [window.input_ids for window in windows], batch_size)
    decoded = decode_all(windows, [starts for starts, _ in found], [ends for _, ends in found], len(questions), options)
    return [
        _answer(question, of_question, options, with_null)
        for question, of_question in zip(questions, decoded, strict=True)
    ]


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _answer(question: Question, decoded: Decoded, options: SpanOptions, with_null: bool) -> Answer:
    probabilities = decoded.probabilities(with_null)
    spans = [
        {
            "text": question.context[span.start : span.end],
            "start": span.start,
            "end": span.end,
            "score": probability,
        }
        for span, probability in zip(decoded.spans, probabilities, strict=True)
    ]
    nothing: dict[str, Any] = {"text": "", "start": None, "end": None, "score": decoded.null_probability}
    unanswered = not spans or (with_null and decoded.null_probability > options.no_answer_threshold)
    best = nothing if unanswered else spans[0]
    row = {"id": question.id, "question": question.question, "answer": best["text"]}
    row |= {key: best[key] for key in ("start", "end", "score")}
    if with_null:
        row |= {
            "no_answer_probability": decoded.null_probability,
            "best_answer": spans[0]["text"] if spans else "",
        }
    line = "no answer" if unanswered else f"{best['text']!r} {_place(best)}"
    heading = f"{question.id}: {_one_line(question.question)}"
    return Answer([heading, f"  {line} {best['score']:.4f}"], {**row, "candidates": spans})


def _entity(sentence: Sentence, start: int, end: int) -> dict[str, Any]:
    if sentence.text is None:
        return {"text": " ".join(sentence.words[start:end]), "start_word": start, "end_word": end}
    first, last = sentence.offsets[start][0], sentence.offsets[end - 1][1]
    return {"text": sentence.text[first:last], "start": first, "end": last}


def _place(found: dict[str, Any]) -> str:
    if "start_word" in found:
        return f"(words {found['start_word']} to {found['end_word']})"
    return f"(characters {found['start']} to {found['end']})"


def _one_line(text: str) -> str:
    return " ".join(text.split())
