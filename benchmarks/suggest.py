"""Suggest the size, vocabulary, length, recipe and batch for prepared text and the minutes that a run may take.

    python -m benchmarks.suggest --data_dir data/corpus --minutes 150

Estimates for one process on this machine, from the rate of matrix products that it reaches while nothing else runs on
it; nothing is trained.
Prints each choice with its reason, and the command.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.cost_model import meta_model
from ds_roberta.command_line import ArgumentParser, run_command
from ds_roberta.config import PRESETS, ModelConfig, model_config
from ds_roberta.data.manifest import TRAIN_SPLIT
from ds_roberta.data.shards import Corpus
from ds_roberta.errors import UserError
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.options import require_positive_number
from ds_roberta.training.peak import measured_rate
from ds_roberta.training.recipes import RECIPES

UTILISATION = {"nano": 0.45, "tiny": 0.59, "small": 0.67, "base": 0.77, "large": 0.75}
"""Share of the rate of matrix products, as `docs/performance.md` has it for a CPU."""
TOKENS_PER_PARAMETER = 12
"""Of the layers' matrices, extrapolated: in 75 minutes of one core tiny sees 8.2 and has a loss 0.08 nats above nano's
(`docs/performance.md`)."""
STEPS, STEP_TOKENS = 1_900, (2_048, 8_192)
"""The recipe's batch is the smallest of those with so many tokens a step; a longer run gets the largest with which it
has so many steps: of nano's runs of 8 million tokens that with 1,953 steps, 32 sequences each, is best
(`benchmarks/results/compare/batch_size.md`)."""
LENGTHS = (128, 256, 512)
FILLED_SHARE = 0.5
"""The share of the tokens that must lie in documents that fill a sequence of a length."""
SMALL_VOCABULARY, VOCABULARY = 8_192, 50_265
PAPERS_BATCH = 8_192
MOST_PASSES = 40
"""BERT's over its corpus (Devlin et al. 2019, appendix A.2)."""


@dataclass(frozen=True)
class Text:
    """What is known of the training split.

    Attributes:
        document_tokens: (documents,) int64.
    """

    document_tokens: np.ndarray
    vocab_size: int

    @classmethod
    def of(cls, corpus: Corpus) -> Text:
        split = corpus.split(TRAIN_SPLIT)
        lengths = [np.diff(split.document_offsets(shard).astype(np.int64)) for shard in range(len(split.shards))]
        return cls(np.concatenate(lengths), corpus.manifest.tokenizer.vocab_size)

    @property
    def tokens(self) -> int:
        return int(self.document_tokens.sum())

    def share_of_documents_of(self, length: int) -> float:
        """The share of the tokens in documents of at least this many."""
        return float(self.document_tokens[self.document_tokens >= length].sum() / max(self.tokens, 1))


@dataclass(frozen=True)
class Suggestion:
    """A run.

    Attributes:
        tokens: what it trains on, estimated.
        needed: by the sizes' names, the tokens that they need.
    """

    model: str
    max_seq_length: int
    vocab_size: int
    recipe: str
    tokens: float
    needed: dict[str, float]

    @property
    def train_batch_size(self) -> int | None:
        """In sequences, a power of two; None: the recipe's."""
        if self.recipe != "fast":
            return None
        least, most = STEP_TOKENS
        step_tokens = min(max(self.tokens / STEPS, least), most)
        return int(2 ** np.floor(np.log2(step_tokens / self.max_seq_length)))


def suggest(text: Text, minutes: float, flops_per_second: float) -> Suggestion:
    """The largest size that can be trained on enough tokens, else the smallest."""
    needed: dict[str, float] = {}
    affordable: dict[str, float] = {}
    for name in PRESETS:
        config, length = model_config(name, text.vocab_size, PRESETS[name].max_seq_length), length_for(name, text)
        share = RECIPES["fast"].options["mlm_probability"]
        rate = UTILISATION[name] * flops_per_second / MaskedLM.flops_per_token(config, length, share)
        needed[name], affordable[name] = TOKENS_PER_PARAMETER * layer_parameters(config), 60 * minutes * rate
    fitting = [name for name in PRESETS if affordable[name] >= needed[name]] or list(PRESETS)[:1]
    model = fitting[-1]
    return Suggestion(
        model,
        length_for(model, text),
        SMALL_VOCABULARY if PRESETS[model].hidden_size < 512 else VOCABULARY,
        "fast" if affordable[model] < STEPS * PAPERS_BATCH * length_for(model, text) else "paper",
        affordable[model],
        needed,
    )


def length_for(model: str, text: Text) -> int:
    """The longest of `LENGTHS` that the size has by default, and that the documents fill."""
    own = [length for length in LENGTHS if length <= PRESETS[model].max_seq_length]
    return max([length for length in own if text.share_of_documents_of(length) >= FILLED_SHARE], default=own[0])


def layer_parameters(config: ModelConfig) -> int:
    return sum(parameter.numel() for parameter in meta_model(config).roberta.encoder.parameters())


def command(suggestion: Suggestion, data_dir: Path, minutes: float) -> list[str]:
    """The words of the command, without `deepspeed`."""
    batch = suggestion.train_batch_size
    return [
        *("launch/pretrain.py", "--recipe", suggestion.recipe, "--model", suggestion.model),
        *("--data_dir", str(data_dir), "--max_seq_length", str(suggestion.max_seq_length)),
        *(("--train_batch_size", str(batch)) if batch else ()),
        *("--max_minutes", f"{minutes:g}"),
    ]


def report(text: Text, suggestion: Suggestion) -> list[tuple[str, str]]:
    """Each choice, and its reason."""
    chosen, passes = suggestion, suggestion.tokens / max(text.tokens, 1)
    larger = [name for name in PRESETS if chosen.needed[name] > chosen.needed[chosen.model]]
    reason = f"about {chosen.tokens / 1e6:,.1f} million tokens in this time; it should have " + (
        f"{chosen.needed[chosen.model] / 1e6:,.1f} million, {TOKENS_PER_PARAMETER} for each parameter of its layers"
    )
    if larger:
        reason += f" ({larger[0]}: {chosen.needed[larger[0]] / 1e6:,.1f} million)"
    has = "as the data" if text.vocab_size == chosen.vocab_size else f"the data has {text.vocab_size:,}"
    small = chosen.vocab_size == SMALL_VOCABULARY
    why = "with more, the projection to them would be most of a small model's work" if small else "as RoBERTa"
    filled, batch = text.share_of_documents_of(chosen.max_seq_length), chosen.train_batch_size
    batches = []
    if batch:
        steps = chosen.tokens / chosen.max_seq_length / batch
        batches = [(f"--train_batch_size {batch}", f"about {steps:,.0f} steps; the recipe's own is for short runs")]
    return [
        (f"--model {chosen.model}", reason),
        (f"vocabulary of {chosen.vocab_size:,}", f"{has}; {why}"),
        (
            f"--max_seq_length {chosen.max_seq_length}",
            f"{filled:.0%} of the tokens are in documents that fill it",
        ),
        (
            f"--recipe {chosen.recipe}",
            f"'paper' is for {STEPS:,} steps of {PAPERS_BATCH:,} sequences and more",
        ),
        *batches,
        (
            f"{passes:,.0f} passes over the text" if passes >= 10 else f"{passes:.2g} passes over the text",
            f"its {text.tokens / 1e6:,.1f} million tokens: BERT took {MOST_PASSES}"
            + (", so more text would help more than more time" if passes > MOST_PASSES else ""),
        ),
    ]


def main(words: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder made by 'preprocess shard'")
    parser.add_argument("--minutes", type=float, required=True, help="of the whole run")
    options = parser.parse_args(words)
    require_positive_number("--minutes", options.minutes)
    text = Text.of(Corpus.open(options.data_dir))
    if not text.tokens:
        raise UserError(f"{str(options.data_dir)!r} has no training documents: prepare some with 'preprocess shard'")
    from ds_roberta.training.device import fastest_precision, on_gpu  # the rest of the module needs no DeepSpeed

    if on_gpu():
        raise UserError(
            "the shares that this reckons with were measured on a CPU only: on a GPU see 'python -m benchmarks.plan', "
            "or hide it with CUDA_VISIBLE_DEVICES="
        )
    rate = measured_rate(torch.device("cpu"), fastest_precision())
    suggestion = suggest(text, options.minutes, rate)
    print(f"An estimate for one process here, at {rate / 1e9:,.0f} GFLOP/s of matrix products:")
    for choice, reason in report(text, suggestion):
        print(f"  {choice:<28} {reason}")
    print("deepspeed", shlex.join(command(suggestion, options.data_dir, options.minutes)))


if __name__ == "__main__":
    run_command(main)
