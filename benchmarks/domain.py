"""Is it worth continuing a pretrained model on a domain's text, with its own tokenizer, with a new one, or not at all?

    python -m benchmarks.domain --model runs/nano/hf --general_data_dir data/wiki \\
        --input peps=peps.jsonl.zst rfcs=rfcs.jsonl.zst --max_minutes 10

`--model` is an export, `--general_data_dir` the text that it was pretrained on, or other general text, prepared with
its tokenizer; `--input` is the domain's text, as `preprocess` takes it. Its sources have names: `NAME=PATH`, or those
in `--source_column`. The model's tokenizer must be a byte-level BPE.

**Compared**, each by `launch/pretrain.py --recipe fast --max_minutes` on one core, with each of the seeds:

- the model continued on the domain with its own tokenizer: `--init_from`;
- continued with a new tokenizer of as many ids, trained on the domain: `--init_from … --remap_token_embeddings`, which
  keeps the embeddings of tokens that both have and begins the others with the mean of their pieces;
- from scratch: its architecture, with the new tokenizer and the recipe's own rates;
- and the model as it was.

Both rates of the recipe are multiplied by `--learning_rate_factors` to continue; with several factors each is a row.
Minutes are CPU time, and contain the start and the export.

**Measured** alike of all of them:

- the held-out loss on the domain and, with the model's own tokenizer, on the general text, in nats per masked token:
  comparable between models with the same tokenizer only;
- the pseudo-log-likelihood of held-out passages of both texts, in nats per byte of UTF-8. A token is masked along with
  the later tokens of its word, so that the sum over a word is -log p(word | the other words): comparable between
  byte-level BPEs, which find the same words, except that the number of masks shows how many tokens the word has.
  Passages are lines of at least 15 words that fit `--max_seq_length` with both tokenizers, `--passages` of them, chosen
  by the hash of their text. What falls on the domain is gained, what rises on the general text is forgotten;
- a task, fine-tuned: which of the sources a held-out passage of the domain comes from. The score of a seed is that of
  its best epoch on the validation split; each row has the rate with the highest median. The seed of fine-tuning is that
  of the run; the model as it was is fine-tuned with each.

**Without a leak.** A tenth of the domain's documents, by the hash of their text and after near copies are dropped, is
held out of the continuation and of the new tokenizer. Of these documents, by the same hash, a third make the task's
validation split and the others its training split, so that no document is in both: at most 200 and 500 passages of each
source. Passages, for nats per byte and for the task, that are near copies (`benchmarks.overlap`) of something in the
training documents of their text are left out, in the validation split also near copies of something in the training
split, and counted. So is a source with fewer than 10 passages in one of the splits.

With the defaults there are nine runs of `--max_minutes`; six more for each further factor. What is measured of a `nano`
takes another half a minute a model for the losses and two minutes for each fine-tuned seed: two hours in all.

Each part is kept in the folder of results as soon as it is finished, and the same command again goes on, after a kill
too. Calls with the same options may run at the same time: each takes what nobody else measures, and waits for the
others at the end. `--parts` chooses some. An item that fails does not keep the others from being measured. Each call
ends with a table of what is finished, and a picture beside it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.domain_report import inputs_by_name, picture, report
from benchmarks.domain_texts import NEW, OWN, PASSAGES, TASK, prepare
from benchmarks.environment import REPOSITORY, cpu_model, publish
from benchmarks.studies import (
    NEVER,
    Item,
    Task,
    add_fine_tuning,
    beside,
    command,
    execute,
    fine_tuned,
    finish_all,
    held_out_loss,
    parts_of,
    recipe_name,
    same_settings,
    trained,
)
from ds_roberta.command_line import ArgumentParser, positive, positive_number, run_command, several, whole_number
from ds_roberta.data import unigram
from ds_roberta.data.manifest import TOKENIZER_FOLDER, VALIDATION_SPLIT
from ds_roberta.data.shards import Corpus
from ds_roberta.data.tokenizer_files import other_token, training_tokenizer
from ds_roberta.errors import UserError
from ds_roberta.evaluation.pseudo_likelihood import encode, pseudo_log_likelihoods
from ds_roberta.evaluation.roberta_folder import open_roberta
from ds_roberta.inputs.tables import read_table
from ds_roberta.training.initial_model import InitialModel
from ds_roberta.training.recipes import RECIPES

TEXTS, TRAINING, LOSSES = "texts", "training", "losses"
PARTS = (TEXTS, TRAINING, LOSSES, TASK)
BEFORE = "before"
SAVE_INTERVAL = 250


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        name: of its files.
        label: in the table.
        tokenizer: `OWN` or `NEW`.
        factor: of the recipe's rates; None where the recipe's own apply, or nothing is trained.
    """

    name: str
    label: str
    tokenizer: str
    factor: float | None = None

    def run(self, seed: int) -> str:
        return f"{self.name}-seed{seed}"

    def losses(self, seed: int) -> str:
        """The name of the item with its losses; the model as it was has one for all seeds."""
        return f"{BEFORE if self.name == BEFORE else self.run(seed)}-{LOSSES}"


def cases_of(options: argparse.Namespace) -> list[Case]:
    continued = [
        Case(f"{tokenizer}-{factor:g}", f"continued, {tokenizer} tokenizer, rates × {factor:g}", tokenizer, factor)
        for factor in options.learning_rate_factors
        for tokenizer in (OWN, NEW)
    ]
    return [Case(BEFORE, "the model as it was", OWN), *continued, Case("scratch", "from scratch, new tokenizer", NEW)]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="an exported model")
    parser.add_argument("--general_data_dir", type=Path, required=True, help="made by 'preprocess shard' for the model")
    parser.add_argument("--input", nargs="+", required=True, metavar="[NAME=]PATH", help="the domain's text")
    parser.add_argument("--source_column", help="column that holds a document's source")
    parser.add_argument("--parts", default=",".join(PARTS), help="which to measure (default: %(default)s)")
    parser.add_argument("--max_minutes", type=positive_number, default=10, help="CPU time of each run (default: 10)")
    parser.add_argument("--learning_rate_factors", type=several(positive_number), default=(0.3,), help="default: 0.3")
    parser.add_argument("--seeds", type=several(whole_number), default=(0, 1, 2))
    parser.add_argument("--passages", type=positive, default=200, help="of each text, for nats per byte")
    add_fine_tuning(parser)
    parser.set_defaults(num_train_epochs=6)  # the task is small
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks/results/domain")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that this runs
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the command that runs is ended, too
    run_command(lambda: study(parser.parse_args()))


def study(options: argparse.Namespace) -> None:
    options.results = options.results.resolve()
    parts = parts_of(options.parts, PARTS)
    same_settings(options.results, checked_settings(options), "results")

    def written(found: dict[str, Any]) -> None:
        cases = cases_of(options)
        picture(options, cases, found, beside(options.results, ".png"))
        publish(report(options, cases, found), beside(options.results, ".md"))

    finish_all(options.results, items(options), parts, written)


def checked_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the results of a folder are of, as JSON values.

    Raises:
        UserError: the model or the general text is not what the study needs.
    """
    model, general = InitialModel.open(options.model), Corpus.open(options.general_data_dir)
    if options.max_seq_length > model.learned_positions:
        raise UserError(
            f"--max_seq_length {options.max_seq_length} is more than the {model.learned_positions} tokens that --model "
            f"{str(options.model)!r} was trained on: give less"
        )
    if unigram.is_model(training_tokenizer(options.model)):
        raise UserError(
            f"--model {str(options.model)!r} has a Unigram tokenizer, whose words are not those of the new byte-level "
            "BPE, so that nothing would compare them: choose a model with a byte-level BPE"
        )
    if difference := other_token(general.folder / TOKENIZER_FOLDER, options.model):
        raise UserError(
            f"--general_data_dir {str(general.folder)!r} was made with another tokenizer than the model's "
            f"({difference}): prepare the text with 'preprocess shard --tokenizer MODEL'"
        )
    if not general.manifest.documents(VALIDATION_SPLIT):
        raise UserError(
            f"--general_data_dir {str(general.folder)!r} has no held-out documents: prepare it with "
            "--validation_fraction"
        )
    given = {
        f"--{name}": list(value) if isinstance(value, tuple) else value
        for name, value in vars(options).items()
        if name not in ("model", "general_data_dir", "parts", "results")
    }
    given["--input"] = inputs_by_name(options.input)
    texts = {"model": model.fingerprint, "general": general.manifest.fingerprint}
    return {**texts, "cpu": cpu_model(), "recipe": recipe_name(), **given}


def items(options: argparse.Namespace) -> Iterator[Item]:
    """In the order in which they are measured."""
    yield Item(TEXTS, TEXTS, (), partial(prepare, options, options.results / TEXTS))
    before, *others = cases_of(options)
    yield Item(LOSSES, f"{BEFORE}-{LOSSES}", (TEXTS,), partial(losses, options, before, BEFORE))
    for seed in options.seeds:
        yield Item(TASK, f"{before.run(seed)}-{TASK}", (TEXTS,), partial(task, options, before, seed))
        for case in others:
            run = case.run(seed)
            yield Item(TRAINING, run, (TEXTS,), partial(train, options, case, seed))
            yield Item(LOSSES, f"{run}-{LOSSES}", (TEXTS, run), partial(losses, options, case, run))
            yield Item(TASK, f"{run}-{TASK}", (TEXTS, run), partial(task, options, case, seed))


def train(options: argparse.Namespace, case: Case, seed: int, lock: int) -> dict[str, Any]:
    output = options.results / case.run(seed)
    settings = {
        "recipe": "fast",
        "data_dir": options.results / TEXTS / case.tokenizer,
        "output_dir": output,
        "max_seq_length": options.max_seq_length,
        "max_minutes": options.max_minutes,
        "seed": seed,
        "eval_interval": NEVER,
        "save_interval": SAVE_INTERVAL,
        "eval_sequences": 16,  # of the run itself, of which nothing is read
        "loss_plateau": "off",
        **rates(options.model, case.factor),
        "model" if case.factor is None else "init_from": options.model,
    }
    remap = ["--remap_token_embeddings"] if case.factor is not None and case.tokenizer == NEW else []
    execute(command("pretrain.py", settings, *remap), lock)
    return trained(output)


def rates(model: Path, factor: float | None) -> dict[str, float]:
    """The options for the fast recipe's rates for the model's width, multiplied; none for its own."""
    if factor is None:
        return {}
    params = RECIPES["fast"].params_for(InitialModel.open(model).config.hidden_size)
    return {"learning_rate": params["adam_lr"] * factor, "muon_lr": params["muon_lr"] * factor}


def exported(options: argparse.Namespace, run: str) -> Path:
    return Path(options.model if run.startswith(BEFORE) else options.results / run / "hf")


def losses(options: argparse.Namespace, case: Case, run: str, lock: int) -> dict[str, Any]:
    """Nats per masked token and per byte; the general text has no figure per masked token with the new tokenizer."""
    model, texts = exported(options, run), options.results / TEXTS
    data = {"domain": texts / case.tokenizer}
    if case.tokenizer == OWN:
        data["general"] = options.general_data_dir
    per_token = {
        kind: held_out_loss(model, folder, options.max_seq_length, texts / f"{run}-{kind}.json", lock)
        for kind, folder in data.items()
    }
    return {"per_token": per_token, "per_byte": nats_per_byte(model, read_table(texts / PASSAGES).rows)}


def nats_per_byte(model: Path, passages: list[dict[str, Any]]) -> dict[str, float]:
    """By the `kind` of the passages, whose `text` the model's tokenizer need not know."""
    folder = open_roberta(model)
    found = {}
    for kind in dict.fromkeys(row["kind"] for row in passages):
        texts = [row["text"] for row in passages if row["kind"] == kind]
        scores = pseudo_log_likelihoods(folder, encode(folder, texts), "within_word_l2r")
        found[kind] = -float(scores.sum()) / sum(len(text.encode("utf-8")) for text in texts)
    return found


def task(options: argparse.Namespace, case: Case, seed: int, lock: int) -> dict[str, Any]:
    run, data = case.run(seed), options.results / TEXTS / TASK
    classification = Task("classification", "accuracy")
    return fine_tuned(options, exported(options, run), classification, data, options.results / run / TASK, [seed], lock)


if __name__ == "__main__":
    main()
