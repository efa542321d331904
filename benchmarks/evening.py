"""Does this tool pretrain? One core for an evening, beside transformers' Trainer and the same model untrained.

    preprocess train-tokenizer --input wiki=wiki-00.jsonl.zst books=books-00.jsonl.zst --vocab_size 8192 \\
        --output data/tokenizer
    preprocess shard --input "wiki=wiki-*.jsonl.zst" "books=books-*.jsonl.zst" --tokenizer data/tokenizer \\
        --output data/corpus
    python -m benchmarks.suggest --data_dir data/corpus --minutes 75
    python -m benchmarks.evening --data_dir data/corpus --tasks data/tasks --pairs data/blimp

`--tasks` has a folder for each task, with `train`, `dev` or `validation`, and `test`, as `launch/finetune.py` takes
them; `--pairs` is a folder of tables such as BLiMP's.

**Compared.** Ours is `launch/pretrain.py --recipe fast --max_minutes` on one core, through three SIGKILLs and a stretch
on two processes, resumed each time by the same command. The Trainer is used as its `run_mlm` example uses it: the same
text, architecture, batch and CPU-minutes, fp32, AdamW with a linear schedule that ends with them, at the learning
rate that is best in shorter runs if several are given. Ours has the precision that is fastest on the machine. The
Trainer's minutes are those of optimizer steps, whose number is estimated from a few at the beginning; those of ours,
planned before the first kill, include the start, evaluations, saves and the export. The table has the CPU-seconds of
both. Untrained are the initial weights of ours. One seed each. All three are then measured by the same commands with
the same options:

- the loss on held-out documents, of each source and of all;
- minimal pairs: the mean accuracy over paradigms;
- tasks, fine-tuned with each of a few learning rates and each of three seeds, with the model's own dropout or that of
  `--finetune_dropout`. A seed's score is that of its best epoch on the validation split, a tenth of the training
  examples where there is none. Each model gets the rate with the highest median. The score on the test split is that
  of the seed that did best on the validation split.

Texts of tasks and minimal pairs that are near copies of something in the training documents (`benchmarks.overlap`) are
left out of all of this, and counted.

**Bars**, set before the first run. Ours passes if

- its held-out loss is below the Trainer's by at least 0.8 nats;
- it is above the Trainer and above untrained in minimal pairs, by more than two standard errors of the difference of
  two accuracies on so many pairs, and its accuracy is at least 58%;
- it is above both in every task outside the spread: the worst of its three seeds is above the best of theirs;
- its mean accuracy on SST-2 is at least 78%.

Each part is kept in the folder of results as soon as it is finished, and the same command again goes on, after a kill
too. Calls with the same options may run at the same time, on several cores: each takes what nobody else measures, and
waits for the others at the end. `--parts` chooses some. An item that fails does not keep the others from being
measured. Each call ends with a table of what is finished, and a picture beside it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY, cpu_model, publish
from benchmarks.evening_evaluation import TASKS, held_out, minimal_pairs, task_score
from benchmarks.evening_pretraining import ours, stretches, trainer, untrained
from benchmarks.evening_report import keep_record, picture, report
from benchmarks.evening_texts import PAIRS, tasks_of, without_overlap
from benchmarks.studies import Item, add_fine_tuning, beside, finish_all, parts_of, recipe_name, same_settings
from ds_roberta.command_line import (
    ArgumentParser,
    positive,
    positive_number,
    run_command,
    several,
    whole_number,
)
from ds_roberta.data.shards import Corpus
from ds_roberta.files import read_json
from ds_roberta.model.objectives import OBJECTIVES

OVERLAP, RECORD, HELD_OUT, FINE_TUNING = "overlap", "record", "held-out", "tasks"
MODELS = {"ours": ours, "trainer": trainer, "untrained": untrained}
PREDICTING = [each.name for each in OBJECTIVES if each.predicts_tokens and not each.is_paired]
PARTS = (OVERLAP, *MODELS, HELD_OUT, RECORD, PAIRS, FINE_TUNING)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder made by 'preprocess shard'")
    parser.add_argument("--tasks", type=Path, required=True, help=f"folder with folders of tasks: {', '.join(TASKS)}")
    parser.add_argument("--pairs", type=Path, required=True, help="folder of tables of minimal pairs")
    parser.add_argument("--parts", default=",".join(PARTS), help="which to measure (default: %(default)s)")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--objective", choices=PREDICTING, default="mlm", help="of ours")
    parser.add_argument("--pretrain_options", default="", help="more for launch/pretrain.py of ours, in one word")
    parser.add_argument("--eval_sequences", type=positive, default=512, help="held-out sequences during training")
    parser.add_argument("--minutes", type=positive_number, default=75, help="for ours, and for the Trainer's steps")
    parser.add_argument("--seed", type=whole_number, default=0, help="of pretraining")
    parser.add_argument("--interval", type=positive, default=250, help="steps of ours between evaluations, and saves")
    parser.add_argument(
        "--stretches",
        type=stretches,
        default=stretches("0.25:1,0.5:1,0.6:2,1:1"),
        metavar="SHARE:PROCESSES,…",
        help="kill ours when a share of its steps is done, and the processes until then (default: three kills)",
    )
    parser.add_argument("--train_batch_size", type=positive, default=64, help="of ours and of the Trainer")
    parser.add_argument("--trainer_learning_rates", type=several(positive_number), default=(2e-3,))
    parser.add_argument("--trainer_search_minutes", type=positive_number, default=10, help="for each of several rates")
    parser.add_argument("--finetune_seeds", type=several(whole_number), default=(0, 1, 2))
    add_fine_tuning(parser)
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks/results/evening")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that this runs
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the command that runs is ended, too
    run_command(lambda: study(parser.parse_args()))


def study(options: argparse.Namespace) -> None:
    options.results = options.results.resolve()
    parts = parts_of(options.parts, PARTS)
    tasks = tasks_of(options, TASKS)
    same_settings(options.results, settings_of(options, tasks), "results")

    def written(found: dict[str, Any]) -> None:
        picture(found, beside(options.results, ".png"))
        publish(report(options, tasks, found), beside(options.results, ".md"))

    finish_all(options.results, items(options, tasks), parts, written)


def settings_of(options: argparse.Namespace, tasks: list[str]) -> dict[str, Any]:
    """What the results of a folder are of, as JSON values."""
    given = {f"--{name}": value for name, value in vars(options).items()
             if name not in ("data_dir", "tasks", "pairs", "parts", "results")}  # fmt: skip
    lists = {name: list(map(list, value)) if name == "--stretches" else list(value)
             for name, value in given.items() if isinstance(value, tuple)}  # fmt: skip
    data = Corpus.open(options.data_dir).manifest.fingerprint
    return {"data": data, "tasks": tasks, "cpu": cpu_model(), "recipe": recipe_name(), **given, **lists}


def items(options: argparse.Namespace, tasks: list[str]) -> Iterator[Item]:
    """In the order in which they are measured."""
    yield Item(OVERLAP, OVERLAP, (), lambda _: without_overlap(options, tasks))
    for model, train in MODELS.items():
        yield Item(model, model, (), partial(train, options))
    for model in MODELS:
        yield Item(HELD_OUT, f"{model}-{HELD_OUT}", (model,), evaluated(options, model, held_out))
    yield Item(RECORD, RECORD, ("ours", f"ours-{HELD_OUT}"), partial(keep_record, options))
    for model in MODELS:
        yield Item(PAIRS, f"{model}-{PAIRS}", (OVERLAP, model), evaluated(options, model, minimal_pairs))
    for task in tasks:
        for model in MODELS:
            tune = partial(task_score, name=task)
            yield Item(FINE_TUNING, f"{model}-{task}", (OVERLAP, model), evaluated(options, model, tune))


def evaluated(options: argparse.Namespace, model: str, measure: Callable[..., dict[str, Any]]) -> Callable[[int], Any]:
    def of_model(lock: int) -> dict[str, Any]:
        folder = options.results / read_json(options.results / f"{model}.json")["hf"]
        return measure(options, folder, lock=lock)

    return of_model


if __name__ == "__main__":
    main()
