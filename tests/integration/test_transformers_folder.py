"""Every command opens the same folders, takes the same length from them, and refuses the others with the same words."""

import json
import os
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from shared_fixtures import change_json

from ds_roberta.errors import UserError
from ds_roberta.evaluation.minimal_pairs import evaluate_minimal_pairs
from ds_roberta.evaluation.perplexity import evaluate_perplexity
from ds_roberta.finetuning.finetune import FinetuneConfig, finetune
from ds_roberta.finetuning.one_run import Recipe, Setting
from ds_roberta.finetuning.predict import open_finetuned
from ds_roberta.training.initial_model import InitialModel
from ds_roberta.transformers_folder import open_folder, quiet, read_model

TRAINED = 32


@pytest.fixture(scope="module")
def sources(roberta_folder, tmp_path_factory):
    """The same model with each head: of masked tokens, and of classes, as `open_finetuned` needs it."""
    root = tmp_path_factory.mktemp("sources")
    shutil.copytree(roberta_folder, root / "masked")
    change_json(root / "masked/tokenizer_config.json", model_max_length=TRAINED)
    shutil.copytree(root / "masked", root / "classes")
    torch.manual_seed(1)
    with quiet():
        model = transformers.RobertaForSequenceClassification.from_pretrained(roberta_folder)
    model.save_pretrained(root / "classes")
    return root


def pickled(folder, **options):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin", **options)
    (folder / "model.safetensors").unlink()


def pickled_long_ago(folder):
    pickled(folder, _use_new_zipfile_serialization=False)


def pickled_code(folder):
    torch.save({**load_file(folder / "model.safetensors"), "evil": print}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def in_parts(folder, lost=False):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(sorted(weights))}
    for part in set(places.values()):
        of_part = {name: weights[name] for name in weights if places[name] == part}
        save_file(of_part, folder / part, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if lost:
        (folder / "model-00002-of-00002.safetensors").unlink()


def linked(folder):
    """Links to files, as the hub's cache keeps them."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), folder))


def dangling(folder):
    linked(folder)
    target = (folder / "model.safetensors").resolve()
    target.unlink()


def only_vocabulary(folder):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "tokenizer.json").unlink()


def as_the_hub_has_it(folder):
    (folder / "tokenizer_config.json").write_text(f'{{"model_max_length": {TRAINED}}}')
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


def without_limit(folder):
    (folder / "tokenizer_config.json").write_text('{"model_max_length": Infinity}')


def another_kind_of_tokenizer(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    change_json(folder / "tokenizer.json", model={**content["model"], "type": "WordPiece"})


def of_unigrams(folder):
    """A tokenizer that transformers silently opens as a byte-level one without merges."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = [[token, -1.0] for token in content["model"]["vocab"]]
    change_json(folder / "tokenizer.json", model={"type": "Unigram", "vocab": vocabulary, "unk_id": 3})


def quantized(folder):
    weights = load_file(folder / "model.safetensors")
    name = "roberta.encoder.layer.0.attention.self.query.weight"
    save_file({**weights, name: weights[name].to(torch.int8)}, folder / "model.safetensors", {"format": "pt"})


def without_a_layer(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["roberta.encoder.layer.0.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


TAKEN = {  # with the length that every command then takes
    "whole": (lambda folder: None, TRAINED),
    "pickled": (pickled, TRAINED),
    "pickled by an old torch": (pickled_long_ago, TRAINED),
    "in parts": (in_parts, TRAINED),
    "links": (linked, TRAINED),
    "vocabulary and merges": (only_vocabulary, TRAINED),
    "as the hub has it": (as_the_hub_has_it, TRAINED),
    "without a limit": (without_limit, 62),
    "a limit of 1e30": (lambda folder: change_json(folder / "tokenizer_config.json", model_max_length=1e30), 62),
    "no tokenizer_config.json": (lambda folder: (folder / "tokenizer_config.json").unlink(), 62),
}
REFUSED = {
    "no folder": (shutil.rmtree, "no model in .*config.json is missing"),
    "a damaged config": (lambda folder: (folder / "config.json").write_text("{"), "config.json' cannot be read"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "no weights in .*choose the folder of a",
    ),
    "a dangling link": (dangling, "no weights in .*choose the folder of a"),
    "a part is missing": (lambda folder: in_parts(folder, lost=True), "00002.safetensors', which is missing there"),
    "a part elsewhere": (
        lambda folder: [in_parts(folder), change_json(folder / f"{SAFETENSORS}.index.json", weight_map={"a": "../b"})],
        "names '../b', which is missing there",
    ),
    "damaged weights": (lambda folder: (folder / SAFETENSORS).write_bytes(b"none"), "weights in .* cannot be read"),
    "pickled code": (pickled_code, "hold more than tensors, which could run code: use model.safetensors"),
    "quantized weights": (quantized, "has dtype torch.int8: use weights in fp32"),
    "a quantized model": (
        lambda folder: change_json(folder / "config.json", quantization_config={"quant_method": "gptq"}),
        "has quantization_config .*: only None is supported",
    ),
    "a decoder": (lambda folder: change_json(folder / "config.json", is_decoder=True), "has is_decoder True"),
    "without a layer": (without_a_layer, "lack 'roberta.encoder.layer.0.output.dense.weight'"),
    "another shape": (
        lambda folder: change_json(folder / "config.json", intermediate_size=32),
        "in another shape than config.json says",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "a damaged tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        "the tokenizer in .* cannot be read",
    ),
    "another kind of tokenizer": (another_kind_of_tokenizer, "has a model of type WordPiece"),
    "a tokenizer of unigrams": (of_unigrams, "has a model of type Unigram: use a tokenizer of the RoBERTa kind"),
    "another pad id": (lambda folder: change_json(folder / "config.json", pad_token_id=5), "<pad> is 1. is not the"),
    "a null pad id": (lambda folder: change_json(folder / "config.json", pad_token_id=None), "the pad_token_id None"),
    "too few ids": (lambda folder: change_json(folder / "config.json", vocab_size=399), "400 ids.* is not the model's"),
    "another architecture": (lambda folder: change_json(folder / "config.json", model_type="bert"), "the type 'bert'"),
    "a length that is none": (
        lambda folder: change_json(folder / "tokenizer_config.json", model_max_length="long"),
        "has the model_max_length 'long'",
    ),
}
SAFETENSORS = "model.safetensors"


@pytest.fixture
def commands(sources, tmp_path, corpus_folder):
    """By a command's name, a function that changes a copy of its model and opens it, and says which length it takes."""
    (tmp_path / "pairs.jsonl").write_text('{"sentence_good": "kato", "sentence_bad": "miren", "UID": "x"}\n')

    def copy(source, change):
        folder = tmp_path / "model"
        shutil.copytree(sources / source, folder)
        change(folder)
        return folder

    def minimal_pairs(change):
        folder = copy("masked", change)
        evaluate_minimal_pairs(folder, [tmp_path / "pairs.jsonl"])
        return open_folder(folder).max_seq_length

    def perplexity(change):
        folder, report = copy("masked", change), tmp_path / "report.json"
        evaluate_perplexity(folder, corpus_folder, sequences=2, json_path=report)
        return json.loads(report.read_text())["packing"]["max_seq_length"]

    def fine_tuning(change):
        folder, output = copy("masked", change), tmp_path / "tuned"
        (tmp_path / "data").mkdir()
        rows = '{"text": "kato", "label": 0}\n{"text": "mi", "label": 1}'
        for split in ("train", "validation"):
            (tmp_path / "data" / f"{split}.jsonl").write_text(rows)
        once = {"recipe": Recipe(num_train_epochs=1), "settings": (Setting(1e-4, 2),)}
        finetune(FinetuneConfig(folder, "classification", (str(tmp_path / "data"),), output, **once))
        length = json.loads((output / "results.json").read_text())["max_seq_length"]
        tokenizer = transformers.AutoTokenizer.from_pretrained(output)
        assert tokenizer.model_max_length == length == open_finetuned(output, None).max_seq_length
        return length

    def predict(change):
        return open_finetuned(copy("classes", change), None).max_seq_length

    def init_from(change):
        initial = InitialModel.open(copy("masked", change))
        assert initial.fingerprint
        initial._weights()
        return initial.learned_positions

    return {
        "minimal-pairs": minimal_pairs,
        "perplexity": perplexity,
        "finetune": fine_tuning,
        "predict": predict,
        "init_from": init_from,
    }


COMMANDS = ["minimal-pairs", "perplexity", "finetune", "predict", "init_from"]


@pytest.mark.parametrize("kind", TAKEN)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_the_same_folders_and_their_trained_length(commands, command, kind):
    change, length = TAKEN[kind]
    assert commands[command](change) == length


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_the_same_folders_in_the_same_words(commands, command, kind, tmp_path):
    change, message = REFUSED[kind]
    with pytest.raises(UserError, match=message) as caught:
        commands[command](change)
    assert str(tmp_path / "model") in str(caught.value)
    assert not (tmp_path / "tuned").exists()


def test_a_length_above_the_trained_one_is_reported_and_one_above_the_positions_refused(sources, caplog):
    folder = open_folder(sources / "masked")
    assert folder.sequence_length(TRAINED) == TRAINED
    assert not caplog.text
    assert folder.sequence_length(TRAINED + 1) == TRAINED + 1
    assert f"more than the {TRAINED} tokens that the model was trained on" in caplog.text
    with pytest.raises(UserError, match="--max_seq_length 63 is more than the model's 62 positions"):
        folder.sequence_length(63)


def test_a_head_that_the_folder_lacks_is_named_with_its_remedy(sources):
    with pytest.raises(UserError, match=r"lacks 'classifier.dense.bias' .*: fine-tune it with launch/finetune.py"):
        read_model(sources / "masked", transformers.RobertaForSequenceClassification)
    with pytest.raises(
        UserError, match=r"lacks 'lm_head.bias' .*: choose the folder of a pretrained RobertaForMaskedLM"
    ):
        read_model(sources / "classes", transformers.RobertaForMaskedLM)


def test_the_logging_of_transformers_is_restored(sources):
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    try:
        transformers.logging.set_verbosity_info()
        transformers.logging.enable_progress_bar()
        read_model(sources / "masked", transformers.RobertaForMaskedLM)
        assert transformers.logging.get_verbosity() == transformers.logging.INFO
        assert transformers.logging.is_progress_bar_enabled()
    finally:
        transformers.logging.set_verbosity(verbosity)
        if not bars:
            transformers.logging.disable_progress_bar()
