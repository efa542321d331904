import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from ds_roberta.config import MaskingConfig, PackingConfig, model_config
from ds_roberta.data.loader import Collator, HeldOutSample
from ds_roberta.data.manifest import TOKENIZER_FOLDER
from ds_roberta.data.masking import evaluation_masker
from ds_roberta.data.packing import build_index, open_index
from ds_roberta.data.words import word_flags
from ds_roberta.errors import UserError
from ds_roberta.evaluation.perplexity import evaluate_perplexity, held_out_perplexity
from ds_roberta.evaluation.roberta_folder import open_roberta
from ds_roberta.model.export import export
from ds_roberta.model.objectives import MaskedLM

LENGTH, SEQUENCES = 96, 20


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = MaskedLM(model_config("nano", 400, LENGTH)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory, model, tokenizer_folder):
    output = tmp_path_factory.mktemp("exported") / "model"
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    export(model_config("nano", 400, LENGTH), weights, tokenizer_folder, LENGTH, output, "card")
    return output


@pytest.fixture(scope="module")
def folder(exported):
    return open_roberta(exported)


def training_loss(model, corpus, packing, masking, ranks):
    """The held-out loss as training computes it, with our model, and how many tokens were masked."""
    tokenizer = corpus.manifest.tokenizer
    build_index(corpus, "validation", packing)
    words = None
    if masking.unit != "token":
        words = word_flags(corpus.folder / TOKENIZER_FOLDER, tokenizer.vocab_size)
    packed = open_index(corpus, "validation", packing)
    collator = Collator(packed, evaluation_masker(masking, tokenizer, words), tokenizer, packing.max_seq_length)
    masked = []

    def loss_sum(batch):
        masked.append(len(batch.labels))
        with torch.no_grad():
            return {"loss": model(batch)["loss"].item()}

    found = HeldOutSample(collator, SEQUENCES, 3, ranks).evaluate(loss_sum)
    return MaskedLM.evaluation(*found), sum(masked)


@pytest.mark.parametrize(
    ("packing", "masking"),
    [
        (PackingConfig(LENGTH), MaskingConfig()),
        (PackingConfig(40, "doc-sentences"), MaskingConfig(0.3, unit="whole-word")),
    ],
)
def test_an_exported_model_has_the_loss_that_its_training_logs(corpus, model, folder, solo_ranks, packing, masking):
    expected, masked = training_loss(model, corpus, packing, masking, solo_ranks)
    result = held_out_perplexity(folder, corpus, packing, masking, SEQUENCES)
    assert result.loss == pytest.approx(expected["loss"], rel=1e-5)
    assert result.perplexity == pytest.approx(expected["perplexity"], rel=1e-4)
    assert (result.masked_tokens, result.sequences) == (masked, SEQUENCES)


def test_the_bins_of_positions_make_up_the_whole(corpus, folder):
    result = held_out_perplexity(folder, corpus, PackingConfig(LENGTH), MaskingConfig(), SEQUENCES)
    assert [(each.first, each.last) for each in result.by_position] == [(0, 63), (64, 95)]
    assert sum(each.masked_tokens for each in result.by_position) == result.masked_tokens
    total = sum(each.loss * each.masked_tokens for each in result.by_position)
    assert total / result.masked_tokens == pytest.approx(result.loss)


def test_a_loss_at_a_position_is_in_its_bin(corpus, folder, monkeypatch):
    """The stand-in's loss of a token is its position."""
    monkeypatch.setattr(
        type(folder), "log_likelihoods", lambda _, input_ids, mask, positions, labels: -(positions % LENGTH).float()
    )
    result = held_out_perplexity(folder, corpus, PackingConfig(LENGTH), MaskingConfig(), SEQUENCES)
    for each in result.by_position:
        assert each.first <= each.loss <= each.last


def test_the_length_is_the_folders_own_and_the_report_is_written(tmp_path, corpus, exported, capsys):
    evaluate_perplexity(exported, corpus.folder, sequences=SEQUENCES, json_path=tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["packing"]["max_seq_length"] == LENGTH
    assert len(report["by_position"]) == 2
    assert f"held-out loss {report['loss']:.4f}" in capsys.readouterr().out


def test_the_command_passes_its_options_on(tmp_path, corpus, exported, monkeypatch):
    path = tmp_path / "out.json"
    options = "--max_seq_length 40 --packing doc-sentences --masking span --mlm_probability 0.3 --eval_sequences 5"
    words = ["--model", exported, "--data", corpus.folder, "--json", path, "--precision", "bf16", *options.split()]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "perplexity", *map(str, words)])
    script = runpy.run_path(str(Path(__file__).parents[2] / "launch/evaluate.py"))
    script["evaluate"](script["make_parser"]().parse_args())
    report = json.loads(path.read_text())
    assert report["packing"] == {"max_seq_length": 40, "format": "doc-sentences"}
    assert (report["masking"]["unit"], report["masking"]["mlm_probability"]) == ("span", 0.3)
    assert (report["sequences"], report["precision"]) == (5, "bf16")


def test_a_tokenizer_that_gives_other_ids_is_refused(tmp_path, corpus, exported):
    copy = tmp_path / "model"
    copy.mkdir()
    for file in exported.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    content = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["ka"], vocabulary["to"] = vocabulary["to"], vocabulary["ka"]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"another tokenizer than the model's \(the token 'ka' has the id"):
        evaluate_perplexity(copy, corpus.folder)


def test_a_length_beyond_the_models_positions_is_refused(corpus, exported):
    with pytest.raises(UserError, match="--max_seq_length 513 is more than the model's 512 positions"):
        evaluate_perplexity(exported, corpus.folder, 513)


def test_positions_that_were_not_trained_are_reported(corpus, exported, caplog):
    evaluate_perplexity(exported, corpus.folder, LENGTH + 8, sequences=4)
    assert f"more than the {LENGTH} tokens that the model was trained on" in caplog.text


def test_a_sample_without_a_masked_token_has_no_loss(corpus, exported):
    with pytest.raises(UserError, match=r"no token of the held-out sequences is masked, .*raise the share of masks"):
        evaluate_perplexity(exported, corpus.folder, masking=MaskingConfig(mlm_probability=1e-9), sequences=1)


def test_data_without_held_out_documents_is_refused(tmp_path, write_corpus, exported):
    write_corpus(tmp_path / "c", {"train": [[[torch.arange(5, 9).numpy()]]]})
    with pytest.raises(UserError, match="no held-out documents"):
        evaluate_perplexity(exported, tmp_path / "c")
