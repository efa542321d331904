"""The scripts of examples/use do with a small export what they promise, and the folders have what servers read."""

import json

import numpy as np
import pytest
import torch
import transformers
from commands import names_of
from safetensors.torch import load_file
from tokenizers import Tokenizer

from ds_roberta.config import model_config
from ds_roberta.finetuning.predict import open_finetuned
from ds_roberta.finetuning.task import label_names
from ds_roberta.model.export import export
from ds_roberta.model.objectives import MaskedLM

LENGTH = 32  # of the sequences that the model was trained on; it has 512 positions
SYLLABLES = ["ka", "to", "mi", "ren", "sul", "pa", "vor", "li", "shen", "du"]


@pytest.fixture(scope="module")
def exported(tokenizer_folder, tmp_path_factory):
    """A folder as a run on short sequences exports it; its random weights are so large that attention is uneven."""
    torch.manual_seed(0)
    config = model_config("nano", 400, LENGTH)
    weights = {
        name: parameter.detach() * (4 if parameter.ndim == 2 else 1)
        for name, parameter in MaskedLM(config).named_parameters()
    }
    folder = tmp_path_factory.mktemp("export") / "model"
    export(config, weights, tokenizer_folder, LENGTH, folder, "")
    return folder


def words(rng, count, syllables=SYLLABLES):
    return ["".join(rng.choice(syllables, size=3)) for _ in range(count)]


def sentence(rng, vocabulary):
    return " ".join(rng.choice(vocabulary, size=6))


@pytest.fixture(scope="module")
def embeddings(exported, tmp_path_factory):
    """The folder of sentence_embeddings.py, and its figures. A document's two sentences have no word in common, but all
    documents of a topic have the same words in the first and the same in the second: only training tells what follows.
    """
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("embeddings")
    topics = [(words(rng, 8), words(rng, 8)) for _ in range(12)]
    documents = [[sentence(rng, side) for side in topics[rng.integers(12)]] for _ in range(800)]
    (folder / "text.txt").write_text("\n\n".join("\n".join(document) for document in documents))
    train = names_of("examples/use/sentence_embeddings.py")["train"]
    figures = train(exported, folder / "model", [folder / "text.txt"], 25, 2e-3, documents[0][0])
    return folder / "model", figures


@pytest.fixture(scope="module")
def tuned(exported, tmp_path_factory):
    """The folder of lora.py, and its figures, for two files with words of other syllables."""
    rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp("lora")
    text = [folder / "first.txt", folder / "second.txt"]
    for path, syllables in zip(text, (SYLLABLES[:5], SYLLABLES[5:]), strict=True):
        vocabulary = words(rng, 20, syllables)
        path.write_text("\n".join(sentence(rng, vocabulary) for _ in range(200)))
    train = names_of("examples/use/lora.py")["train"]
    return folder / "tuned", train(exported, folder / "tuned", text, 30, 5e-3)


def test_sentence_embeddings_find_neighbours_among_those_of_other_documents(embeddings):
    folder, shares = embeddings
    assert shares["chance"] == 10 / 80
    assert shares["after"] > 0.5 > 2 * max(shares["before"], shares["chance"])
    from sentence_transformers import SentenceTransformer

    texts = ["kato miren sulpa.", "vor li"]
    tokenizer, encoder = (kind.from_pretrained(folder) for kind in (transformers.AutoTokenizer, transformers.AutoModel))
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = encoder(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    opened = SentenceTransformer(str(folder), local_files_only=True)
    torch.testing.assert_close(opened.encode(texts, convert_to_tensor=True).cpu(), mean)
    assert opened.max_seq_length == LENGTH


def test_lora_trains_the_adapter_which_predicts_the_same_when_opened_and_when_merged(tuned):
    folder, figures = tuned
    weights = load_file(folder / "adapter/adapter_model.safetensors")
    assert sum(map(torch.Tensor.numel, weights.values())) == figures["trained parameters"]
    assert all(weight.any() for name, weight in weights.items() if "lora_B" in name)  # they begin as 0
    assert figures["share of all parameters"] < 0.1
    assert figures["accuracy"] > 0.9 > figures["share of the most frequent label"]
    assert figures["difference of the opened adapter"] == 0
    assert 0 < figures["difference of the merged model"] < 1e-4
    assert label_names(open_finetuned(folder / "merged", None).model.config) == ["first", "second"]


@pytest.mark.filterwarnings("ignore:# The axis name")
@pytest.mark.parametrize("kind", ["export", "classifier", "encoder"])
def test_onnx_runtime_gives_torchs_outputs_in_any_batch_and_length(exported, request, kind, tmp_path):
    if kind == "export":
        folder = exported
    elif kind == "classifier":
        folder = request.getfixturevalue("tuned")[0] / "merged"
    else:
        folder = request.getfixturevalue("embeddings")[0]
    assert names_of("examples/use/onnx_export.py")["export"](folder, tmp_path / "model.onnx") < 1e-5
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert {node.name: node.shape for node in session.get_inputs()} == {
        "input_ids": ["batch", "length"],
        "attention_mask": ["batch", "length"],
    }
    name = "last_hidden_state" if kind == "encoder" else "logits"  # without the noise of a new pooler
    shape = {"export": ["batch", "length", 400], "classifier": ["batch", 2], "encoder": ["batch", "length", 128]}[kind]
    assert {node.name: node.shape for node in session.get_outputs()} == {name: shape}


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


NUMBERS = {  # of config.json, without which text-embeddings-inference does not start
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("max_position_embeddings", "type_vocab_size", "pad_token_id"),
    *("hidden_dropout_prob", "initializer_range", "layer_norm_eps"),
}


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [("export", "RobertaForMaskedLM"), ("embeddings", "RobertaModel"), ("tuned", "RobertaForSequenceClassification")],
)
def test_every_folder_has_what_servers_read(exported, request, kind, architecture):
    folder = exported if kind == "export" else request.getfixturevalue(kind)[0] / ("merged" if kind == "tuned" else "")
    config, limit = read(folder, "config.json"), read(folder, "tokenizer_config.json")["model_max_length"]
    assert (config["model_type"], config["architectures"]) == ("roberta", [architecture])
    assert config["position_embedding_type"] == "absolute"  # or vLLM would not take the tokenizer's limit
    assert config["hidden_act"] == "gelu"
    assert [name for name in NUMBERS if not isinstance(config[name], int | float)] == []
    assert limit == LENGTH <= config["max_position_embeddings"] - config["pad_token_id"] - 1

    weights = load_file(folder / "model.safetensors")
    prefix = "" if architecture == "RobertaModel" else "roberta."
    for name, rows in (("word", "vocab_size"), ("position", "max_position_embeddings")):
        embedding = weights[f"{prefix}embeddings.{name}_embeddings.weight"]
        assert embedding.shape == (config[rows], config["hidden_size"])

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = tokenizer.encode("kato", "miren")
    assert (encoded.tokens[0], encoded.tokens[-1], {*encoded.type_ids}) == ("<s>", "</s>", {0})
    assert tokenizer.token_to_id("<pad>") == config["pad_token_id"]


def test_the_folder_of_embeddings_tells_old_and_new_servers_how_to_pool(embeddings):
    folder, _ = embeddings
    assert [(module["path"], module["type"]) for module in read(folder, "modules.json")] == [
        ("", "sentence_transformers.base.modules.transformer.Transformer"),
        ("1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
    ]
    pooling = read(folder, "1_Pooling/config.json")
    assert (pooling["pooling_mode"], pooling["pooling_mode_cls_token"]) == ("mean", False)
    assert next(name for name, value in pooling.items() if value is True) == "pooling_mode_mean_tokens"
    length = read(folder, "sentence_bert_config.json")
    assert (length["max_seq_length"], length["do_lower_case"]) == (LENGTH, False)


def test_the_folder_of_a_classifier_names_its_labels(tuned):
    config = read(tuned[0] / "merged", "config.json")
    assert config["id2label"] == {"0": "first", "1": "second"}
    assert config["label2id"] == {"first": 0, "second": 1}
    head = load_file(tuned[0] / "merged/model.safetensors")
    assert head["classifier.out_proj.weight"].shape == (2, config["hidden_size"])
