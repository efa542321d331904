"""A transformers folder: the one place where a RoBERTa's config, weights and tokenizer are opened and checked."""

from __future__ import annotations

import pickle
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
import transformers

from ds_roberta.config import MODEL_TYPES, class_name
from ds_roberta.data.byte_level import SPECIAL_TOKENS
from ds_roberta.data.tokenizer import (
    PROBES,
    REMEDY,
    TokenizerInfo,
    check_text_is_kept,
    read_tokenizer_config,
    tokenizer_content,
)
from ds_roberta.data.tokenizer_files import (
    NAMED_TOKENS,
    class_of,
    stated_length,
    training_tokenizer,
    write_tokenizer,
)
from ds_roberta.data.unigram import is_unigram
from ds_roberta.errors import UserError
from ds_roberta.files import read_json_object
from ds_roberta.process import logger

EXPORT_AGAIN = "export or copy the model again"
MOST_PIECES = 2000
"""The maximum number of the vocabulary's tokens whose text is compared."""
MOST_LABELS = 1 << 16
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""transformers' names for a file of weights; with `.index.json` added, for the list of several."""
_KNOWN_SETTINGS = {"is_decoder": False, "position_embedding_type": "absolute"}
_KNOWN_SETTINGS |= dict.fromkeys(("quantization_config", "transformers_weights"))
"""Settings that make a RoBERTa a different model, or name other weights, with the only value supported here.

`model.architecture` refuses more: what transformers can compute, but our own encoder cannot.
"""
_OUTPUTS = {"output_hidden_states": False, "output_attentions": False, "return_dict": True}
"""What a model returns, whatever its folder says: every command relies on it."""
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The floating-point dtypes by safetensors' names."""
_TIED = "lm_head.decoder."
"""The beginning of the names of the head's parameters that are tied to others."""
Model = TypeVar("Model", bound="transformers.PreTrainedModel")


@dataclass(frozen=True)
class TransformersFolder:
    """A folder with a matching config and tokenizer; the weights have not been read.

    Attributes:
        max_positions: the maximum number of tokens in a sequence, `<s>` and `</s>` included.
        max_seq_length: the trained length, as far as the folder says: what its tokenizer truncates to, at most
            `max_positions`.
    """

    path: Path
    config: transformers.RobertaConfig
    special: TokenizerInfo
    max_positions: int
    max_seq_length: int

    def sequence_length(self, asked: int | None, shortest: int = 1) -> int:
        """The length that is asked for, with a warning if it is more than the trained one; by default that one.

        Raises:
            UserError: it is less than `shortest`, or the model has fewer positions.
        """
        length = self.max_seq_length if asked is None else asked
        if length < shortest:
            what = f"model_max_length of the tokenizer in {str(self.path)!r}" if asked is None else "--max_seq_length"
            raise UserError(f"{what} must be at least {shortest}, got {length}")
        if length > self.max_positions:
            raise UserError(
                f"--max_seq_length {length} is more than the model's {self.max_positions} positions: reduce it"
            )
        if length > self.max_seq_length:
            logger.warning(
                f"--max_seq_length {length} is more than the {self.max_seq_length} tokens that the model was trained on"
                "; later positions have learned nothing"
            )
        return length


def open_folder(folder: Path) -> TransformersFolder:
    """Read a folder as `save_pretrained` writes it, or as downloaded from a model hub.

    Raises:
        UserError: it is not such a folder, not of RoBERTa's architecture, without weights or tokenizer, or its parts do
            not fit together.
    """
    config = _read_config(folder)
    weights_files(folder)
    special = TokenizerInfo.read(folder)
    check_text_is_kept(training_tokenizer(folder), folder)
    if config.pad_token_id != special.pad_token_id or config.vocab_size < special.vocab_size:
        raise UserError(
            f"the tokenizer in {str(folder)!r} ({special.vocab_size} ids, <pad> is {special.pad_token_id}) is not the "
            f"model's ({config.vocab_size} ids, <pad> is {config.pad_token_id}): copy the tokenizer that it was "
            "trained with there"
        )
    positions = config.max_position_embeddings - config.pad_token_id - 1  # RoBERTa counts from the pad id on
    if positions < 1:
        raise UserError(
            f"{str(folder / 'config.json')!r} has {config.max_position_embeddings} position embeddings, too few: copy "
            "the model again"
        )
    return TransformersFolder(folder, config, special, positions, min(positions, stated_length(folder) or positions))


def weights_files(folder: Path) -> list[Path]:
    """The files of a folder's weights, chosen as transformers does.

    Raises:
        UserError: there are none, or their index is damaged or names a file that is missing.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                names = sorted(set(read_json_object(index, EXPORT_AGAIN)["weight_map"].values()))
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{str(index)!r} is not an index of weights ({error!r}): copy it again") from error
            for part in names:
                if Path(part).name != part or not (folder / part).is_file():
                    raise UserError(f"{str(index)!r} names {part!r}, which is missing there: copy the whole model")
            return [folder / part for part in names]
    known = ", ".join((*WEIGHTS, *(f"{name}.index.json" for name in WEIGHTS)))
    raise UserError(f"no weights in {str(folder)!r} ({known}): choose the folder of a whole model")


def read_model(
    folder: Path,
    model_class: type[Model],
    dtype: torch.dtype = torch.float32,
    changes: dict[str, Any] | None = None,
) -> Model:
    """The model of a folder, on the CPU; a `RobertaModel` without pooler. Of pickled weights only tensors are read.

    Args:
        model_class: RoBERTa's; of a folder of another type, the class that corresponds to it is used.
        changes: configuration values in place of the folder's, for a model to be trained on: a head that the folder
            lacks or has in another shape is initialized; None: the folder must have the head.

    Raises:
        UserError: there are no weights, they are damaged or not floating-point numbers, or some are missing.
    """
    files, config = weights_files(folder), _read_config(folder, changes)
    kind = model_class.__name__
    if kind.startswith(MODEL_TYPES["roberta"]):
        model_class = getattr(transformers, class_name(config.model_type, kind))
    lacking = "lack {!r} or have it in another shape than config.json says: copy the model's files again"
    try:
        shapes = {name: shape for path in files for name, shape in _shapes(path).items()}
        if (misfit := _misfit(config, shapes)) is not None:
            raise UserError(f"the weights in {str(folder)!r} {lacking.format(misfit)}")
        with quiet():
            model, report = model_class.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **({"add_pooling_layer": False} if kind.endswith("Model") else {}),
            )
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"the pickled weights in {str(folder)!r} are damaged or hold more than tensors, which could run code: "
            "use model.safetensors"
        ) from error
    except Exception as error:  # the libraries raise nothing more precise
        raise UserError(
            f"the weights in {str(folder)!r} cannot be read ({error}): export or copy them again"
        ) from error
    missing = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    of_encoder = [key for key in missing if key.startswith(f"{model.base_model_prefix}.")]
    if of_encoder:
        raise UserError(f"the weights in {str(folder)!r} {lacking.format(of_encoder[0])}")
    if missing and changes is None:
        remedy = "fine-tune it with launch/finetune.py"
        if kind.endswith("ForMaskedLM"):
            remedy = "choose the folder of a pretrained RobertaForMaskedLM, which still has its head"
        raise UserError(
            f"the model in {str(folder)!r} lacks {missing[0]!r} or has it in another shape than its config: {remedy}"
        )
    return model


def parameters_by_name(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """A model's parameters by RoBERTa's names; `XLMRobertaForMaskedLM` names the tied ones after the head's decoder."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if not name.startswith(_TIED)}


@contextmanager
def quiet() -> Iterator[None]:
    """Make transformers log only errors and show no progress bars."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with without_progress_bars():
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from showing progress bars."""
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers.logging.enable_progress_bar()


def open_tokenizer(folder: Path, add_prefix_space: bool | None = None) -> transformers.PreTrainedTokenizerBase:
    """transformers' tokenizer of a folder, completed as `write_tokenizer` does, whatever the folder leaves out.

    Raises:
        UserError: the folder has no tokenizer of RoBERTa's kind.
    """
    with tempfile.TemporaryDirectory() as temporary:
        write_tokenizer(folder, Path(temporary), add_prefix_space=add_prefix_space)
        tokenizer_class = read_tokenizer_config(Path(temporary))["tokenizer_class"]
        try:
            tokenizer = getattr(transformers, tokenizer_class).from_pretrained(temporary, local_files_only=True)
        except Exception as error:  # the libraries raise nothing more precise
            raise UserError(f"the tokenizer in {str(folder)!r} cannot be read ({error}): copy it again") from error
    tokenizer.name_or_path, tokenizer.padding_side = str(folder), "right"  # labels of tokens count from the left
    return tokenizer


def check_tokenizer(folder: Path, training: Path, add_prefix_space: bool | None = None) -> None:
    """Refuse a folder that transformers' `AutoTokenizer` opens as another tokenizer than training's.

    This compares the class, the special tokens and their ids, the vocabulary, and the ids of texts in many scripts, of
    pairs, of the letters of special tokens, and of a text with a mask.

    Args:
        folder: the folder that was written.
        training: the folder of training's tokenizer.
        add_prefix_space: see `training_tokenizer`.

    Raises:
        UserError: they differ.
    """
    try:
        difference = _difference(folder, training, add_prefix_space)
    except UserError:
        raise
    except Exception as error:  # the libraries raise nothing more precise
        difference = repr(error)
    if difference is not None:
        raise UserError(
            f"transformers {transformers.__version__} does not open the tokenizer in {str(training)!r} as training uses"
            f" it ({difference}): nothing was written; try another version of transformers, or {REMEDY}"
        )


def _difference(folder: Path, training: Path, add_prefix_space: bool | None) -> str | None:
    """The first difference in words; None if there is none."""
    opened = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    reference, special = training_tokenizer(training, add_prefix_space), TokenizerInfo.read(training)
    expected_class = class_of(tokenizer_content(training))
    if type(opened) is not getattr(transformers, expected_class):
        return f"its class is {type(opened).__name__}, not {expected_class}"
    vocabulary = reference.get_vocab(with_added_tokens=True)
    if opened.get_vocab() != vocabulary:
        return "another vocabulary"
    for name, token in NAMED_TOKENS.items():
        found = (getattr(opened, name), getattr(opened, f"{name}_id"))
        expected = (token, vocabulary[token]) if token in vocabulary else (None, None)
        if found != expected:
            return f"{name} is {found}, not {expected}"

    def ids(text: str) -> list[int]:
        return reference.encode(text, add_special_tokens=False).ids

    bos, eos, mask = special.bos_token_id, special.eos_token_id, special.mask_token_id
    ordinary = sorted(set(vocabulary.values()) - set(special.special_ids))
    pieces = reference.decode(ordinary[:: 1 + len(ordinary) // MOST_PIECES])
    texts = [*PROBES.values(), *(f" {token} Text{token}" for token in SPECIAL_TOKENS), pieces]
    if is_unigram(tokenizer_content(training)):  # transformers takes a special token's letters for the token
        texts = [text.replace("<", " ") for text in texts]
    for text in texts:
        if opened(text, split_special_tokens=True, verbose=False)["input_ids"] != [bos, *ids(text), eos]:
            return f"{text[:40]!r} has other ids"
        pair = opened(text, text, split_special_tokens=True, verbose=False)["input_ids"]
        if pair != [bos, *ids(text), eos, eos, *ids(text), eos]:
            return f"the pair of {text[:40]!r} and itself has other ids"
    if opened("He sat at the <mask>.")["input_ids"] != [bos, *ids("He sat at the"), mask, *ids("."), eos]:
        return "a text with <mask> has other ids"
    return None


def _read_config(folder: Path, changes: dict[str, Any] | None = None) -> transformers.RobertaConfig:
    """A folder's config, with `changes` in place of its own values."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"no model in {str(folder)!r} (config.json is missing): choose a local transformers folder, such as "
            "launch/export_hf.py writes"
        )
    if (folder / "adapter_config.json").exists():  # transformers would take the model that it names, whatever is here
        raise UserError(
            f"{str(folder)!r} has an adapter (adapter_config.json): merge it into its model and save that "
            "(peft: merge_and_unload), or remove it"
        )
    content = read_json_object(path, EXPORT_AGAIN)
    if "model_type" not in content and "run" in content:
        raise UserError(f"{str(folder)!r} is a run's folder: choose the model in it, such as {str(folder / 'hf')!r}")
    if str(content.get("model_type")) not in MODEL_TYPES:
        raise UserError(
            f"the model in {str(folder)!r} has the type {content.get('model_type')!r}: only RoBERTa's architecture is "
            f"supported, which has the types {', '.join(MODEL_TYPES)}"
        )
    for name, known in _KNOWN_SETTINGS.items():
        if content.get(name, known) != known:
            raise UserError(f"the model in {str(folder)!r} has {name} {content[name]!r}: only {known!r} is supported")
    labels = content.get("num_labels")  # the library names each of them
    if labels is not None and (type(labels) is not int or not 0 <= labels <= MOST_LABELS):
        raise UserError(f"the model in {str(folder)!r} has num_labels {labels!r}: remove it, or give their number")
    config_class = getattr(transformers, class_name(content["model_type"], "RobertaConfig"))
    settings = {name: value for name, value in content.items() if _is_setting(config_class, name)}
    try:
        config = config_class.from_dict({**settings, **_OUTPUTS, **(changes or {})})
    except Exception as error:  # the library's validators raise their own kinds
        raise UserError(f"{str(path)!r} is not a RoBERTa's ({error}): copy the model again") from error
    if not isinstance(config.pad_token_id, int):
        raise UserError(f"{str(path)!r} has the pad_token_id {config.pad_token_id!r}: give its id")
    names = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{str(path)!r} has the architectures {config.architectures!r}: list the model's class")
    return config


def _is_setting(config_class: type[transformers.RobertaConfig], name: str) -> bool:
    """Whether a key of `config.json` is not one that replaces a method or an internal of the config, or that names a
    kernel, which transformers would fetch from the hub and run."""
    is_internal = name.startswith("_") or callable(getattr(config_class, name, None))
    return not is_internal and name != "attn_implementation"


def _shapes(path: Path) -> dict[str, list[int]]:
    """The shape of each of a file's weights; raises `UserError` if they are not stored as floating-point numbers, for
    example quantized."""
    if path.suffix == ".bin":
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        stored = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    else:
        with safetensors.safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no dict
            stored = {
                name: (_FLOATS.get(part.get_dtype()) or file.get_tensor(name).dtype, part.get_shape())
                for name, part in parts.items()
            }
    for name, (dtype, _) in stored.items():
        if dtype not in _FLOATS.values() and not name.endswith("position_ids"):
            raise UserError(f"{name!r} in {str(path)!r} has dtype {dtype}: use weights in fp32, fp16 or bf16")
    return {name: shape for name, (_, shape) in stored.items()}


def _misfit(config: transformers.RobertaConfig, shapes: Mapping[str, list[int]]) -> str | None:
    """A parameter of the encoder that a config needs and the stored weights lack, or have in another shape.

    It is looked for before transformers takes memory and time for whatever sizes a `config.json` has.
    """
    expected = {
        "embeddings.word_embeddings.weight": [config.vocab_size, config.hidden_size],
        "embeddings.position_embeddings.weight": [config.max_position_embeddings, config.hidden_size],
        "embeddings.token_type_embeddings.weight": [config.type_vocab_size, config.hidden_size],
    }
    if config.num_hidden_layers > 0:
        width = [config.intermediate_size, config.hidden_size]
        expected["encoder.layer.0.intermediate.dense.weight"] = width
        expected[f"encoder.layer.{config.num_hidden_layers - 1}.intermediate.dense.weight"] = width
    stored = {name.removeprefix("roberta."): shape for name, shape in shapes.items()}
    return next((name for name, shape in expected.items() if stored.get(name) != shape), None)
