import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ds_roberta.config import model_config
from ds_roberta.data.tokenizer_files import write_tokenizer
from ds_roberta.errors import UserError
from ds_roberta.model import export as export_module
from ds_roberta.model.export import CARD_SIGNATURE, export, hf_config
from ds_roberta.model.objectives import MaskedLM

LENGTH = 48


@pytest.fixture(scope="module")
def config():
    return model_config("nano", 400, LENGTH)


@pytest.fixture
def weights(config):
    torch.manual_seed(0)
    return {name: parameter.detach() + 0.01 for name, parameter in MaskedLM(config).named_parameters()}


@pytest.fixture
def do_export(config, weights, tokenizer_folder):
    return lambda output: export(config, weights, tokenizer_folder, LENGTH, output, f"It was {CARD_SIGNATURE}.")


def assert_nothing_left(tmp_path, *expected):
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(expected)


def test_the_folder_opens_with_transformers_and_holds_our_weights(tmp_path, config, weights, do_export):
    assert do_export(tmp_path / "a/b/model") <= export_module.PARITY_TOLERANCE
    model, report = transformers.RobertaForMaskedLM.from_pretrained(tmp_path / "a/b/model", output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    expected, found = hf_config(config).to_dict(), model.config.to_dict()
    names = set(expected) - {"architectures", "dtype", "transformers_version", "_name_or_path"}
    assert {name: found[name] for name in names} == {name: expected[name] for name in names}
    assert found["position_embedding_type"] == "absolute"  # which vLLM reads, though transformers 5 does not
    assert load_file(tmp_path / "a/b/model/model.safetensors").keys() <= weights.keys()
    assert_nothing_left(tmp_path / "a/b", "model")


@pytest.mark.parametrize("pad_token_id", [398, 399])
def test_parity_is_checked_if_the_padding_has_one_of_the_last_ids(pad_token_id):
    config = model_config("nano", 400, LENGTH, pad_token_id)
    weights = {name: parameter.detach() for name, parameter in MaskedLM(config).named_parameters()}
    model = export_module.to_transformers(config, weights)
    assert export_module.check_parity(config, weights, model) <= export_module.PARITY_TOLERANCE


def test_the_tokenizer_in_the_folder_gives_the_same_ids(tmp_path, do_export, tokenizer_folder):
    do_export(tmp_path / "model")
    source = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "kato miren <mask> sulpa Grüße."
    assert exported(text)["input_ids"] == source(text)["input_ids"]
    assert exported.mask_token_id in exported(text)["input_ids"]
    assert exported.model_max_length == LENGTH
    assert len(exported("kato " * 200, truncation=True)["input_ids"]) == LENGTH


def test_a_tokenizer_that_names_no_class_is_completed(tmp_path, config, weights, tokenizer_folder):
    """The checkpoint has the unchanged file of RoBERTa on the hub."""
    (tmp_path / "tokenizer").mkdir()
    for name, content in (
        ("tokenizer.json", (tokenizer_folder / "tokenizer.json").read_bytes()),
        ("tokenizer_config.json", b'{"model_max_length": 512}'),
    ):
        (tmp_path / "tokenizer" / name).write_bytes(content)
    export(config, weights, tmp_path / "tokenizer", LENGTH, tmp_path / "model", "")
    fill = transformers.pipeline("fill-mask", model=str(tmp_path / "model"))
    assert type(fill.tokenizer).__name__ == "RobertaTokenizer"
    assert fill.tokenizer.model_max_length == LENGTH
    assert len(fill(["kato <mask>.", "miren <mask> sulpa kato."], batch_size=2)) == 2


def test_a_tokenizer_that_opens_as_another_is_refused_and_nothing_is_written(tmp_path, do_export, monkeypatch):
    def write_badly(source, target, *arguments):
        write_tokenizer(source, target, *arguments)
        (target / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')

    monkeypatch.setattr(export_module, "write_tokenizer", write_badly)
    with pytest.raises(UserError, match=r"uses it \(its class is TokenizersBackend, not RobertaTokenizer\)"):
        do_export(tmp_path / "model")
    assert_nothing_left(tmp_path)


def test_a_model_exported_before_is_replaced(tmp_path, weights, do_export):
    do_export(tmp_path / "model")
    (tmp_path / "model/vocab.json").write_text("of the old model")
    weights["lm_head.bias"] = weights["lm_head.bias"] + 1
    do_export(tmp_path / "model")
    model = transformers.RobertaForMaskedLM.from_pretrained(tmp_path / "model")
    assert torch.equal(model.lm_head.bias, weights["lm_head.bias"])
    assert not (tmp_path / "model/vocab.json").exists()
    assert_nothing_left(tmp_path, "model")


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path, do_export):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    do_export(tmp_path / "model")
    assert (tmp_path / "model").is_symlink()
    assert (tmp_path / "disk/model.safetensors").is_file()


def missing(weights):
    del weights["lm_head.dense.bias"]


def superfluous(weights):
    weights["roberta.pooler.dense.weight"] = torch.zeros(128, 128)


def another_shape(weights):
    name = "roberta.embeddings.word_embeddings.weight"
    weights[name] = weights[name][:-1]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (missing, "lm_head.dense.bias"),
        (superfluous, "roberta.pooler.dense.weight"),
        (another_shape, "roberta.embeddings.word_embeddings.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, weights, do_export, change, name):
    change(weights)
    with pytest.raises(UserError, match=f"do not fit .*'{name}'"):
        do_export(tmp_path / "model")
    assert_nothing_left(tmp_path)


@pytest.fixture
def broken_conversion(monkeypatch):
    """The exporter loses a little of a weight."""
    convert = export_module.to_transformers

    def convert_badly(*arguments):
        model = convert(*arguments)
        with torch.no_grad():
            model.roberta.encoder.layer[1].attention.self.value.bias.add_(0.05)
        return model

    monkeypatch.setattr(export_module, "to_transformers", convert_badly)


@pytest.mark.usefixtures("broken_conversion")
def test_logits_that_differ_are_refused_and_nothing_is_written(tmp_path, do_export):
    with pytest.raises(UserError, match="logits differ from the training model's by"):
        do_export(tmp_path / "model")
    assert_nothing_left(tmp_path)


def test_an_earlier_model_outlives_an_export_that_fails(tmp_path, do_export, request):
    do_export(tmp_path / "model")
    before = (tmp_path / "model/model.safetensors").read_bytes()
    request.getfixturevalue("broken_conversion")
    with pytest.raises(UserError, match="logits differ"):
        do_export(tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    assert_nothing_left(tmp_path, "model")


def test_large_logits_may_differ_by_their_rounding(tmp_path, weights, do_export):
    weights["lm_head.layer_norm.weight"] = weights["lm_head.layer_norm.weight"] * 10_000
    assert 0 < do_export(tmp_path / "model") <= export_module.PARITY_TOLERANCE


def test_weights_that_are_not_numbers_are_refused(tmp_path, weights, do_export):
    weights["lm_head.bias"] = weights["lm_head.bias"].clone().fill_(float("nan"))
    with pytest.raises(UserError, match=r"'lm_head.bias' is not finite: the training has diverged"):
        do_export(tmp_path / "model")
    assert_nothing_left(tmp_path)


def test_finite_weights_of_a_model_whose_logits_are_not_are_refused(tmp_path, weights, do_export):
    """They are finite in float64, in which the models are compared."""
    weights.update({name: weight * 1e18 for name, weight in weights.items() if name.endswith("dense.weight")})
    with pytest.raises(UserError, match="the model's logits are not finite in fp32: the training has diverged"):
        do_export(tmp_path / "model")
    assert_nothing_left(tmp_path)


def test_something_else_is_not_replaced(tmp_path, do_export):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis' is not empty and not an exported model"):
        do_export(tmp_path / "thesis")
    assert (tmp_path / "thesis/chapter.txt").read_text() == "years of work"
    with pytest.raises(UserError, match=r"chapter.txt' is a file"):
        do_export(tmp_path / "thesis/chapter.txt")
    assert_nothing_left(tmp_path / "thesis", "chapter.txt")


@pytest.mark.parametrize("damage", ["results.json", "notes.txt", "README.md"])
def test_a_model_of_another_or_with_other_files_is_not_replaced(tmp_path, do_export, damage):
    """Of a fine-tuning, with notes of the user's, and a downloaded one, whose card is another."""
    do_export(tmp_path / "model")
    (tmp_path / "model" / damage).write_text("precious")
    with pytest.raises(UserError, match="not empty and not an exported model without other files"):
        do_export(tmp_path / "model")
    assert (tmp_path / "model" / damage).read_text() == "precious"


def test_an_empty_folder_is_filled(tmp_path, do_export):
    (tmp_path / "model").mkdir()
    do_export(tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == "roberta"


def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path, do_export):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*fix this or choose another output"):
        do_export(tmp_path / "file/model")
