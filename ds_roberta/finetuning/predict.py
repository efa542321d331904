"""A fine-tuned model's answers to texts: on the screen for people, as JSON lines for programs."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from ds_roberta.errors import UserError
from ds_roberta.files import atomic_path, errors_of_the_disk
from ds_roberta.finetuning.answers import Answer, answer_questions, answer_sentences, answer_texts
from ds_roberta.finetuning.examples import Columns, Texts, find_texts
from ds_roberta.finetuning.inference import FinetunedModel, open_finetuned
from ds_roberta.finetuning.labelled_tables import read_table
from ds_roberta.finetuning.question_answering import read_questions
from ds_roberta.finetuning.spans import SpanOptions
from ds_roberta.finetuning.squad import Question
from ds_roberta.finetuning.tagged_sentences import WORD_COLUMNS, Sentence, read_conll, split_text, table_sentences

COMMAND_LINE = "the command line"  # where a single text stands, for messages


@dataclass(frozen=True)
class PredictConfig:
    """What is asked of a model.

    Attributes:
        input: a file; None: `text` alone, with `text_pair` where the task has pairs (as question of a context).
        output: where the JSON lines go; None: nowhere.
        max_seq_length: in tokens; None: the length in fine-tuning.
        no_answer_threshold: see `SpanOptions`; None: as in fine-tuning, where no answer was an answer.
    """

    model: Path
    input: Path | None = None
    text: str | None = None
    text_pair: str | None = None
    output: Path | None = None
    columns: Columns = field(default_factory=Columns)
    max_seq_length: int | None = None
    batch_size: int = 32
    no_answer_threshold: float | None = None


def predict(config: PredictConfig) -> list[Answer]:
    """Print an answer to each text of the input, and write it as a line of JSON.

    Raises:
        UserError: the model's folder, the input or the output is wrong.
    """
    if config.output is not None:
        _check_output(config.output, config.input)
    finetuned = open_finetuned(config.model, config.max_seq_length)
    answers = make_answers(finetuned, config)
    if config.output is not None:
        write_rows(config.output, answers)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # letters that the terminal does not know
    for answer in answers:
        print("\n".join(answer.lines), flush=True)
    return answers


def _check_output(output: Path, given: Path | None) -> None:
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"--output {str(output)!r} is a folder or lies in none: give a file in a folder")
    if output.exists() and not output.is_file():
        raise UserError(f"--output {str(output)!r} is a device or a pipe: give a file")
    if given is not None and output.resolve() == given.resolve():
        raise UserError(f"--output {str(output)!r} is the input: give another file")


def make_answers(finetuned: FinetunedModel, config: PredictConfig) -> list[Answer]:
    if finetuned.task == "token-classification":
        return answer_sentences(finetuned, _sentences(config), config.batch_size)
    if finetuned.task == "question-answering":
        options, with_null = _span_options(finetuned, config.no_answer_threshold)
        return answer_questions(finetuned, _questions(config), options, with_null, config.batch_size)
    return answer_texts(finetuned, _texts(config), config.batch_size)


def write_rows(path: Path, answers: list[Answer]) -> None:
    """Write the answers as JSON lines, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    with (
        errors_of_the_disk(path),
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):
        for answer in answers:
            file.write(json.dumps(answer.row, ensure_ascii=False) + "\n")


def _texts(config: PredictConfig) -> Texts:
    if config.input is None:
        assert config.text is not None
        pair = None if config.text_pair is None else [config.text_pair]
        return Texts([config.text], pair, lambda index: COMMAND_LINE)
    return find_texts(read_table(config.input), config.columns)


def _sentences(config: PredictConfig) -> list[Sentence]:
    if config.input is None:
        assert config.text is not None
        return [split_text(COMMAND_LINE, config.text)]
    if config.input.suffix not in (".jsonl", ".parquet"):
        return read_conll(config.input, labelled=False)
    table = read_table(config.input)
    column = config.columns.text or next((name for name in WORD_COLUMNS if name in table.columns), None)
    if column is not None and any(isinstance(row.get(column), list) for row in table.rows):
        return table_sentences(table, column, None, labelled=False)
    texts = find_texts(table, config.columns)
    return [split_text(texts.place(index), text) for index, text in enumerate(texts.firsts)]


def _questions(config: PredictConfig) -> list[Question]:
    if config.input is None:
        if config.text is None or config.text_pair is None:
            raise UserError("the model answers questions: give --question and --context, or --input")
        return [Question(COMMAND_LINE, "1", config.text_pair, config.text)]
    return read_questions(config.input, labelled=False).questions


def _span_options(finetuned: FinetunedModel, threshold: float | None) -> tuple[SpanOptions, bool]:
    """How fine-tuning decoded, or the usual way; and whether there may be no answer."""
    stored = finetuned.results.get("question_answering") or {}
    try:
        options = SpanOptions(**stored.get("options", {}))
    except (AttributeError, TypeError) as error:
        raise UserError(f"results.json of the model has another question_answering than is known ({error})") from error
    if threshold is not None:
        options = replace(options, no_answer_threshold=threshold)
    return options, threshold is not None or bool(stored.get("may_be_unanswerable"))
