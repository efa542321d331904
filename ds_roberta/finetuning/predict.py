"""A fine-tuned model's answers to texts: on the screen for people, as a file for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from ds_roberta.errors import UserError
from ds_roberta.files import read_json_object
from ds_roberta.finetuning import TASKS
from ds_roberta.finetuning.prediction_files import check_board, check_output, with_other_columns, write_predictions
from ds_roberta.finetuning.question_answering import QuestionAnswering
from ds_roberta.finetuning.task import RESULTS, SHORTEST, Answer, Task
from ds_roberta.model.kernels import set_gpu_arithmetic
from ds_roberta.options import require_positive
from ds_roberta.process import logger
from ds_roberta.progress import progress_bar
from ds_roberta.transformers_folder import EXPORT_AGAIN, open_folder, open_tokenizer, read_model


@dataclass(frozen=True)
class PredictConfig:
    """The inputs and options of a prediction.

    Attributes:
        input: a file; None: only `text`, with `text_pair` if the task has pairs, or `question` about `context`.
        output: the file for programs, see `prediction_files`; None: answers are only printed for people.
        glue_task: the task of GLUE's board that the output is for, a key of `BOARDS`.
        task_options: the task's own, by name. Missing ones are as in fine-tuning.
        max_seq_length: in tokens; None: as in fine-tuning.

    Raises:
        UserError: not exactly one of `input`, `text` and `question` is given, or a value does nothing, is
            empty or is too small.
    """

    model: Path
    input: str | None = None
    text: str | None = None
    text_pair: str | None = None
    question: str | None = None
    context: str | None = None
    output: Path | None = None
    glue_task: str | None = None
    task_options: dict[str, Any] = field(default_factory=dict)
    max_seq_length: int | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        if (self.question is None) != (self.context is None):
            raise UserError("--question and --context go together: give both")
        if sum(given is not None for given in (self.input, self.text, self.question)) != 1:
            raise UserError("one of --input, --text and --question says what to predict from: give one of them")
        if self.text_pair is not None and self.text is None:
            raise UserError("--text_pair goes with --text: give both")
        if self.glue_task is not None and self.output is None:
            raise UserError("--glue_task needs --output, a .tsv file: give it")
        for name in ("text", "text_pair", "question", "context"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise UserError(f"--{name} {value!r} is empty: give a text")
        for name in ("text_column", "text_pair_column"):
            if self.input is None and name in self.task_options:
                raise UserError(f"--{name} does nothing without --input: leave it out")
        require_positive("--batch_size", self.batch_size)
        if self.max_seq_length is not None:
            require_positive("--max_seq_length", self.max_seq_length)


@dataclass(frozen=True)
class FinetunedModel:
    """A fine-tuned model with its task and its tokenizer.

    Attributes:
        max_seq_length: in tokens, the special ones included.
    """

    task: Task
    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    max_seq_length: int


def predict(config: PredictConfig) -> list[Answer]:
    """Print an answer to each text of the input, and write it with the other columns of its row.

    Raises:
        UserError: the model's folder, an option, the input or the output is wrong.
    """
    if config.output is not None:
        check_output(config.output, config.input, config.glue_task)
    finetuned = open_finetuned(config.model, config.max_seq_length, config.task_options)
    task = finetuned.task
    if config.text_pair is not None and not task.takes_pairs:
        raise UserError(f"the model is of --task {task.name}, which takes single texts: give one with --text only")
    if config.glue_task is not None:
        check_board(config.glue_task, task.head)
    if config.input is not None:
        inputs = task.read_inputs(str(config.input))
    elif config.question is not None and config.context is not None:
        if not isinstance(task, QuestionAnswering):
            remedy = "--text and --text_pair" if task.takes_pairs else "--text"
            raise UserError(f"the model is of --task {task.name}, which answers no questions: give {remedy}")
        inputs = [task.make_input(config.context, config.question)]
    elif config.text is not None:
        if isinstance(task, QuestionAnswering):  # of two texts, it is not clear which is the question
            raise UserError("the model answers questions: give --question and --context, or --input")
        inputs = [task.make_input(config.text, config.text_pair)]
    encoded = task.encode(finetuned.tokenizer, inputs, finetuned.max_seq_length)
    sequences = [feature["input_ids"] for feature in encoded.features]
    answers = task.answer(encoded, logits(finetuned, sequences, config.batch_size))
    if config.output is not None:
        rows = with_other_columns([task.other_columns(given) for given in inputs], [answer.row for answer in answers])
        write_predictions(config.output, rows, config.glue_task)
    for answer in answers:
        print("\n".join(answer.lines), flush=True)
    if config.output is not None:
        logger.info(f"wrote {config.output}: {len(answers):,} rows")
    return answers


def open_finetuned(folder: Path, max_seq_length: int | None, given: dict[str, Any] | None = None) -> FinetunedModel:
    """Read a folder with a task's head; the model goes to the GPU if there is one.

    Args:
        max_seq_length: None: as in fine-tuning.
        given: the task's options, by name.

    Raises:
        UserError: the folder has no such model, its parts do not fit together, the model has fewer positions, or an
            option does nothing for its task.
    """
    set_gpu_arithmetic()
    opened = open_folder(folder)
    results = read_json_object(folder / RESULTS, EXPORT_AGAIN) if (folder / RESULTS).is_file() else {}
    known = [task for task in TASKS.values() if task.fits(opened.config)]
    if not known:
        architecture = (opened.config.architectures or ["model without a name"])[0]
        raise UserError(
            f"{str(folder)!r} holds a {architecture}, which has no head for predictions: fine-tune it with "
            "launch/finetune.py"
        )
    task_class = next((task for task in known if task.name == results.get("task")), known[0])
    given = given or {}
    names = {each.name for each in fields(task_class.options_class)}
    if not task_class.takes_pairs:
        names.discard("text_pair_column")
    if unused := [name for name in given if name not in names]:
        raise UserError(f"--{unused[0]} does nothing with a model of --task {task_class.name}: leave it out")
    length = opened.sequence_length(max_seq_length, SHORTEST)
    model = read_model(folder, getattr(transformers, task_class.architecture))
    return FinetunedModel(
        task_class.from_model(opened.config, results, given),
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval(),
        open_tokenizer(folder),
        length,
    )


def logits(finetuned: FinetunedModel, sequences: Sequence[list[int]], batch_size: int) -> Any:
    """The model's output for each sequence of token ids, as `Task.metrics` takes it; float32.

    Raises:
        UserError: a logit is not finite.
    """
    found: dict[int, list[np.ndarray]] = {}
    by_length = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    tokens = sum(map(len, sequences))  # the time is in proportion to these
    with progress_bar(total=tokens, unit="token", unit_scale=True, delay=0.5, leave=False) as progress:
        for start in range(0, len(by_length), batch_size):
            chosen = by_length[start : start + batch_size]
            batch = finetuned.tokenizer.pad({"input_ids": [sequences[index] for index in chosen]}, return_tensors="pt")
            with torch.inference_mode():
                output = finetuned.model(**batch.to(finetuned.model.device)).to_tuple()
            arrays = [tensor.float().cpu().numpy() for tensor in output]
            if not all(np.isfinite(array).all() for array in arrays):
                raise UserError(
                    f"the logits of the model in {finetuned.model.name_or_path!r} are not finite: its training "
                    "diverged or its weights are damaged; fine-tune it again"
                )
            found |= {index: [array[row] for array in arrays] for row, index in enumerate(chosen)}
            progress.update(sum(len(sequences[index]) for index in chosen))
    outputs = list(zip(*(found[index] for index in range(len(sequences))), strict=True))
    return outputs[0] if len(outputs) == 1 else outputs
