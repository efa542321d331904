"""The model that a run starts from, if it does not start from scratch: a transformers folder, or a checkpoint of ours.

Its architecture becomes the run's; its weights are resized on request, for longer sequences or another tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from transformers import RobertaForMaskedLM

from ds_roberta.config import ModelConfig
from ds_roberta.data.manifest import TOKENIZER_FOLDER
from ds_roberta.data.shards import Corpus
from ds_roberta.data.stages import TRAIN_STATE_NAME
from ds_roberta.data.tokenizer import in_the_alphabet_of
from ds_roberta.data.tokenizer_files import other_token, training_tokenizer
from ds_roberta.data.unigram import UNKNOWN
from ds_roberta.errors import UserError
from ds_roberta.files import file_checksum, json_fingerprint
from ds_roberta.model.architecture import CONFIG_NAME, architecture, stored_architecture
from ds_roberta.model.initialization import are_sinusoids
from ds_roberta.model.objectives import Objective
from ds_roberta.model.weights import (
    POSITION_EMBEDDINGS,
    VOCABULARY_PARAMETERS,
    first_not_finite,
    position_rows,
    token_rows,
    token_sources,
)
from ds_roberta.training import checkpoint
from ds_roberta.training.settings import RunConfig
from ds_roberta.transformers_folder import open_folder, parameters_by_name, read_model, weights_files


@dataclass(frozen=True)
class InitialModel:
    """A trained model in a folder, its weights not read yet.

    Attributes:
        config: its architecture.
        learned_positions: tokens of the longest sequences it was trained on: for a checkpoint, in its run or before it;
            for a transformers folder, what its tokenizer truncates to, at most its positions.
        tokenizer_folder: with `tokenizer.json`.
        is_checkpoint: whether the folder is a checkpoint of this program; else it is a transformers folder.
    """

    folder: Path
    config: ModelConfig
    learned_positions: int
    tokenizer_folder: Path
    is_checkpoint: bool

    @classmethod
    def open(cls, folder: Path) -> InitialModel:
        """Read all but the weights of a folder's model.

        Raises:
            UserError: it is neither a checkpoint nor a transformers folder of a RoBERTa with its tokenizer.
        """
        if (folder / checkpoint.CHECKPOINTS_FOLDER).is_dir():
            raise UserError(
                f"--init_from {str(folder)!r} is a run's folder, which may change: name one of its "
                f"{checkpoint.CHECKPOINTS_FOLDER}/global_stepN, or its exported model"
            )
        if not (folder / TRAIN_STATE_NAME).is_file():
            return cls._open_transformers(folder)
        if not (folder / checkpoint.MANIFEST_NAME).is_file():
            missing = f"is not a whole checkpoint ({checkpoint.MANIFEST_NAME} is missing)"
            raise UserError(f"--init_from {str(folder)!r} {missing}: copy it again")
        with checkpoint.errors_of_the_state(folder):
            state = checkpoint.read_state(folder)
            config = stored_architecture(state.identity["model"], folder / TRAIN_STATE_NAME)
            length = state.trained_length
        return cls(folder, config, length, folder / TOKENIZER_FOLDER, True)

    @classmethod
    def _open_transformers(cls, folder: Path) -> InitialModel:
        opened = open_folder(folder)
        config = architecture(opened.config.to_dict(), folder / CONFIG_NAME)
        return cls(folder, config, opened.max_seq_length, folder, False)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights as they were stored when it was first asked for, wherever the folder is."""
        if self.is_checkpoint:
            return file_checksum(self.folder / checkpoint.MANIFEST_NAME)
        return json_fingerprint({path.name: file_checksum(path) for path in weights_files(self.folder)})

    def resized(
        self, corpus: Corpus, max_seq_length: int, extend_positions: bool, remap_token_embeddings: bool
    ) -> ModelConfig:
        """The architecture of a run that begins with this model.

        Raises:
            UserError: the sequences are longer than in its training, or the data has another tokenizer, without the
                option that allows it; or that option is given without need.
        """
        learned, where = self.learned_positions, f"the model in {str(self.folder)!r}"
        if max_seq_length > learned and not extend_positions:
            raise UserError(
                f"--max_seq_length {max_seq_length} is more than the {learned} positions that {where} was trained "
                "with: give less, or --extend_positions"
            )
        if extend_positions and max_seq_length <= learned:
            raise UserError(
                f"--extend_positions does nothing with --max_seq_length {max_seq_length}, as {where} was trained with "
                f"{learned} positions: remove it or raise the length"
            )
        difference = self._other_token(corpus)
        if difference and not remap_token_embeddings:
            raise UserError(
                f"the data in {str(corpus.folder)!r} was made with another tokenizer than {where} ({difference}): "
                "prepare the text again with 'preprocess shard --tokenizer MODEL', or give --remap_token_embeddings"
            )
        if remap_token_embeddings and not difference:
            raise UserError(f"--remap_token_embeddings does nothing: the data has the tokenizer of {where}: remove it")
        config, tokenizer = self.config, corpus.manifest.tokenizer
        if remap_token_embeddings:
            config = replace(config, vocab_size=tokenizer.vocab_size, **tokenizer.config_ids)
        longest = max(self.config.max_length, max_seq_length)
        return replace(config, max_position_embeddings=longest + config.pad_token_id + 1)

    def _other_token(self, corpus: Corpus) -> str | None:
        folders = (corpus.folder / TOKENIZER_FOLDER, self.tokenizer_folder)
        return _other_token(*folders, corpus.manifest.tokenizer.fingerprint)

    def has_fixed_positions(self, run: RunConfig) -> bool:
        """Whether its position embeddings are sinusoids, which stay as they are; but extended ones are trained."""
        if run.packing.max_seq_length > self.learned_positions:
            return False
        return are_sinusoids(self._weights()[POSITION_EMBEDDINGS], self.config.pad_token_id)

    def initialize(self, model: Objective, run: RunConfig, corpus: Corpus) -> list[str]:
        """Give the run's model the weights of this one, resized as `resized` says.

        Parameters of a head that this one does not have stay as they are.

        Returns:
            Lines for the log about what was done.

        Raises:
            UserError: the weights cannot be read, are not finite, or do not fit.
        """
        weights, done = self._weights(), [f"the weights are those in {self.folder}"]
        if (name := first_not_finite(weights.items())) is not None:
            raise UserError(f"{name!r} in {str(self.folder)!r} is not finite: take weights from before it diverged")
        if self._other_token(corpus):
            old = training_tokenizer(self.tokenizer_folder)
            unknown = old.token_to_id(UNKNOWN)
            new = training_tokenizer(corpus.folder / TOKENIZER_FOLDER).get_vocab(with_added_tokens=True)
            vocabulary = old.get_vocab(with_added_tokens=True)
            sources, shared = token_sources(
                vocabulary,
                in_the_alphabet_of(self.tokenizer_folder, new, corpus.folder / TOKENIZER_FOLDER),
                run.model.vocab_size,
                lambda text: [piece.id for piece in old.model.tokenize(text) if piece.id != unknown],
            )
            for name in weights.keys() & VOCABULARY_PARAMETERS:  # without a masked-LM head there is only one
                weights[name] = token_rows(weights[name], sources, sorted(vocabulary.values()))
            done.append(
                f"embeddings of {shared:,} tokens are copied, those of {len(new) - shared:,} are the mean of the "
                "pieces that the old tokenizer splits them into"
            )
        learned = self.config.max_length
        if run.packing.max_seq_length > self.learned_positions:
            learned = self.learned_positions
            done.append(
                f"positions from {learned} to {run.model.max_length - 1} begin as copies of the {learned} before"
            )
        weights[POSITION_EMBEDDINGS] = position_rows(
            weights[POSITION_EMBEDDINGS],
            self.config.pad_token_id,
            learned,
            run.model.pad_token_id,
            run.model.max_length,
        )
        left_out, fresh = _copy(weights, model, self.folder)
        done += [
            f"{' and '.join(names)} {verb}"
            for names, verb in ((left_out, "left out"), (fresh, "initialized at random"))
            if names
        ]
        return done

    def _weights(self) -> dict[str, torch.Tensor]:
        """The fp32 weights by parameter name."""
        if self.is_checkpoint:
            checkpoint.verify(self.folder)
            return checkpoint.weights(self.folder)
        model = read_model(self.folder, RobertaForMaskedLM)
        return {name: parameter.detach() for name, parameter in parameters_by_name(model).items()}


def _copy(weights: dict[str, torch.Tensor], model: Objective, folder: Path) -> tuple[list[str], list[str]]:
    """Copy the weights that the model has parameters for; return the modules left out and those without weights."""
    parameters = dict(model.named_parameters())
    missing = parameters.keys() - weights.keys()
    wrong = sorted(name for name in missing if name.startswith("roberta."))
    wrong += sorted(name for name in parameters.keys() & weights if parameters[name].shape != weights[name].shape)
    if wrong:
        raise UserError(
            f"the weights in {str(folder)!r} do not fit their config; the first that differs is {wrong[0]!r}"
        )
    with torch.no_grad():
        for name in parameters.keys() & weights:
            parameters[name].copy_(weights[name])
    superfluous = weights.keys() - parameters.keys()
    return _modules(superfluous), _modules(missing)


def _modules(names: set[str]) -> list[str]:
    return sorted({name.split(".")[0] for name in names})


@lru_cache(maxsize=1)  # a budget asks for each number of steps that it tries, and reading a vocabulary takes a second
def _other_token(data: Path, model: Path, fingerprint: str) -> str | None:
    """As `other_token`, again when the data's tokenizer is another one."""
    return other_token(data, model)
