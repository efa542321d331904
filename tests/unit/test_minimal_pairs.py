import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import transformers
from shared_fixtures import change_json

from ds_roberta.config import model_config
from ds_roberta.errors import UserError
from ds_roberta.evaluation import minimal_pairs, pseudo_likelihood
from ds_roberta.evaluation.minimal_pairs import (
    Pair,
    PairOptions,
    evaluate_minimal_pairs,
    make_report,
    read_pairs,
    score_pairs,
)
from ds_roberta.evaluation.pseudo_likelihood import Sentence, encode, masked_copies, pseudo_log_likelihoods
from ds_roberta.evaluation.roberta_folder import open_roberta
from ds_roberta.model.export import export, hf_config
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.progress import progress_bar

LENGTH = 32
TEXTS = ["kato miren sulpa.", "to", "kato miren", "shenli vor du, pakami renvor!", "kato miren sulpa."]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer_folder):
    torch.manual_seed(0)
    config = model_config("nano", 400, LENGTH)
    weights = {name: parameter.detach() * 2 for name, parameter in MaskedLM(config).named_parameters()}
    output = tmp_path_factory.mktemp("exported") / "model"
    export(config, weights, tokenizer_folder, LENGTH, output, "card")
    return output


@pytest.fixture(scope="module")
def folder(exported):
    return open_roberta(exported)


def plain_score(folder, exported, text, metric):
    """One masked copy at a time, by transformers' own model and tokenizer."""
    model = transformers.RobertaForMaskedLM.from_pretrained(exported).eval()
    encoding = transformers.AutoTokenizer.from_pretrained(exported)(text)
    true_ids, words = torch.tensor(encoding["input_ids"]), encoding.word_ids()
    score = 0.0
    for place in range(1, len(true_ids) - 1):
        masked = true_ids.clone()
        masked[place] = folder.special.mask_token_id
        if metric == "within_word_l2r":
            for later in range(place + 1, len(true_ids) - 1):
                if words[later] == words[place]:
                    masked[later] = folder.special.mask_token_id
        with torch.no_grad():
            logits = model(input_ids=masked[None]).logits[0, place]
        score += logits.log_softmax(-1)[true_ids[place]].item()
    return score


@pytest.mark.parametrize("metric", ["original", "within_word_l2r"])
def test_scores_equal_those_of_a_plain_loop(folder, exported, metric):
    expected = [plain_score(folder, exported, text, metric) for text in TEXTS]
    assert pseudo_log_likelihoods(folder, encode(folder, TEXTS), metric) == pytest.approx(expected, abs=1e-4)


def test_the_metrics_differ_if_a_word_has_several_tokens(folder):
    sentences = encode(folder, TEXTS)
    assert any(len(set(sentence.words)) < len(sentence.words) for sentence in sentences)
    original, left_to_right = (
        pseudo_log_likelihoods(folder, sentences, metric) for metric in ("original", "within_word_l2r")
    )
    assert not np.allclose(original, left_to_right)


def test_the_size_of_batches_changes_nothing(folder):
    sentences = encode(folder, TEXTS)
    expected = pseudo_log_likelihoods(folder, sentences)
    for batch_tokens in (1, 23, 60):
        assert pseudo_log_likelihoods(folder, sentences, batch_tokens=batch_tokens) == pytest.approx(expected, abs=1e-4)


def test_the_last_layer_goes_on_only_at_masked_tokens(folder):
    sentences = encode(folder, TEXTS[:4])
    rows = []
    layers = folder.model.roberta.encoder.layer
    hooks = [
        layer.output.register_forward_hook(lambda _, inputs, output: rows.append(output[..., 0].numel()))
        for layer in layers
    ]
    pseudo_log_likelihoods(folder, sentences)
    for hook in hooks:
        hook.remove()
    copies = [len(sentence.ids) for sentence in sentences]
    assert sum(rows[len(layers) - 1 :: len(layers)]) == sum(copies) < sum(rows[:: len(layers)])
    assert not layers[-1].attention.output._forward_pre_hooks


def test_a_log_file_shows_the_progress(folder, monkeypatch, capsys):
    monkeypatch.setattr(pseudo_likelihood, "progress_bar", lambda **options: progress_bar(**{**options, "delay": 0}))
    pseudo_log_likelihoods(folder, encode(folder, TEXTS))
    assert "100%" in capsys.readouterr().err


def test_batches_keep_to_their_tokens_and_hold_every_token_once(folder):
    sentences = encode(folder, TEXTS[:4])
    batches = list(masked_copies(sentences, folder.special, "original", 40))
    assert all(batch.input_ids.size <= 40 for batch in batches)
    seen = [place for batch in batches for place in zip(batch.sentences, batch.columns - 1, batch.labels, strict=True)]
    expected = [(s, t, label) for s, sentence in enumerate(sentences) for t, label in enumerate(sentence.ids)]
    assert sorted(seen) == expected


def test_the_letters_of_a_special_token_are_text(folder):
    (sentence,) = encode(folder, ["kato <mask> <pad>"])
    assert not set(sentence.ids) & set(folder.special.special_ids)


def pair(good, bad, phenomenon="p", field="f"):
    return Pair(good, bad, phenomenon, field, "data.jsonl, line 3")


def test_ties_are_counted_and_wrong(folder):
    pairs = [pair("kato to", "kato to"), pair("to", "to", "q", "")]
    report = make_report(pairs, score_pairs(folder, pairs, "original"))
    assert (report.phenomena["p"].ties, report.phenomena["p"].correct, report.mean_accuracy) == (1, 0, 0.0)
    assert list(report.fields) == ["f"]


def test_ties_count_half_in_an_accuracy_of_their_own():
    scores = np.array([[-1.0, -2.0], [-3.0, -3.0], [-2.0, -1.0], [-1.0, -1.0], [-1.0, -3.0]])
    report = make_report([pair("a", "b", phenomenon) for phenomenon in "ppppq"], scores)
    assert (report.phenomena["p"].ties, report.phenomena["p"].accuracy) == (2, 1 / 4)
    assert report.phenomena["p"].accuracy_with_half_ties == (1 + 2 / 2) / 4
    assert report.mean_accuracy_with_half_ties == (1 / 2 + 1) / 2
    assert report.fields["f"].accuracy_with_half_ties == (2 + 2 / 2) / 5


def test_accuracies_are_of_their_groups_and_the_mean_is_over_phenomena(folder):
    low, high = sorted(TEXTS[:3], key=lambda text: pseudo_log_likelihoods(folder, encode(folder, [text]))[0])[::2]
    right, wrong = (high, low), (low, high)
    pairs = [pair(*right), pair(*right), pair(*wrong), pair(*right, "q")]
    report = make_report(pairs, score_pairs(folder, pairs, "original"))
    assert report.phenomena["p"].accuracy == pytest.approx(2 / 3)
    assert report.phenomena["q"].accuracy == 1
    assert report.fields["f"].accuracy == 3 / 4
    assert report.mean_accuracy == pytest.approx((2 / 3 + 1) / 2)


def line(**changes):
    entry = {"sentence_good": "kato to", "sentence_bad": "to kato", "UID": "order", "field": "syntax/semantics"}
    return json.dumps({**entry, **changes})


def test_the_report_is_printed_and_written(tmp_path, exported, capsys):
    (tmp_path / "a.jsonl").write_text(line() + "\n\n" + line(UID="other") + "\n")
    (tmp_path / "b.jsonl").write_text(line())
    evaluate_minimal_pairs(exported, [tmp_path], json_path=tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    assert {name: group["pairs"] for name, group in report["phenomena"].items()} == {"order": 2, "other": 1}
    assert report["fields"]["syntax_semantics"]["pairs"] == 3
    assert f"{report['mean_accuracy']:.1%}" in capsys.readouterr().out.splitlines()[-1]


def test_the_command_passes_its_options_on(tmp_path, exported, monkeypatch):
    (tmp_path / "more").mkdir()
    for name in ("data.jsonl", "more/data.jsonl"):
        (tmp_path / name).write_text(line())
    words = ["--model", exported, "--data", tmp_path / "data.jsonl", tmp_path / "more", "--json", tmp_path / "out.json"]
    words += ["--metric", "within_word_l2r", "--precision", "bf16", "--pairs", tmp_path / "pairs.txt"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "minimal-pairs", *map(str, words)])
    script = runpy.run_path(str(Path(__file__).parents[2] / "launch/evaluate.py"))
    script["evaluate"](script["make_parser"]().parse_args())
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["metric"], report["precision"]) == ("within_word_l2r", "bf16")
    assert report["phenomena"]["order"]["pairs"] == len((tmp_path / "pairs.txt").read_text().splitlines()) == 2


def test_no_pair_is_counted_twice_or_left_out_silently(tmp_path, exported, caplog):
    (tmp_path / "more").mkdir()
    for name in ("data.jsonl", "more/data.jsonl"):
        (tmp_path / name).write_text(line())
    with pytest.raises(UserError, match=r"data.jsonl' 2 times: name each table once"):
        evaluate_minimal_pairs(exported, [tmp_path / "data.jsonl", tmp_path])
    with caplog.at_level("WARNING"):
        assert evaluate_minimal_pairs(exported, [tmp_path]).overall.pairs == 1
    assert "not read are the folders in it: more" in caplog.text


def test_an_unknown_metric_or_precision_is_refused(exported, tmp_path):
    with pytest.raises(UserError, match="--metric must be one of original, within_word_l2r"):
        evaluate_minimal_pairs(exported, [tmp_path], "within-word-l2r")
    with pytest.raises(UserError, match="--precision must be one of"):
        evaluate_minimal_pairs(exported, [tmp_path], precision="fp8")


def test_files_with_dots_in_their_names_are_different_phenomena(tmp_path):
    row = json.dumps({"sentence_good": "a", "sentence_bad": "b", "field": 0})
    for name in ("agreement.number.jsonl", "agreement.gender.jsonl"):
        (tmp_path / name).write_text(row)
        (found,) = read_pairs(tmp_path / name, PairOptions())
        assert (found.phenomenon, found.field) == (name.removesuffix(".jsonl"), "0")


def test_a_sentence_without_tokens_is_refused(folder, monkeypatch):
    monkeypatch.setattr(minimal_pairs, "encode", lambda folder, texts: [Sentence((5,), (0,)), Sentence((), ())])
    with pytest.raises(UserError, match="line 3: the tokenizer leaves nothing of a sentence"):
        score_pairs(folder, [pair("a", "b")], "original")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("don't go, kato", ["don", "'t", "go", ",", "kato"]),
        ("हिन्दी भाषा cafe\u0301", ["हिन्दी", "भाषा", "cafe\u0301"]),
        ("他不 ภาษา", ["他", "不", "ภ", "า", "ษ", "า"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
    ],
)
def test_words_are_those_of_the_script(folder, text, words):
    (sentence,), (encoding,) = encode(folder, [text]), folder.tokenizer.encode_batch([text], add_special_tokens=False)
    spans = {}
    for word, (first, last) in zip(sentence.words, encoding.offsets, strict=True):
        before = spans.get(word, (first, last))
        spans[word] = min(before[0], first), max(before[1], last)
    assert [text[first:last] for first, last in spans.values()] == words


def test_pairs_have_keys_of_other_names_and_the_file_names_the_phenomenon(tmp_path):
    path = tmp_path / "agreement.jsonl"
    path.write_text(json.dumps({"right": "kato to", "wrong": "to kato"}) + "\n")
    options = PairOptions(good_column="right", bad_column="wrong")
    assert read_pairs(path, options) == [Pair("kato to", "to kato", "agreement", "", f"{path}, row 1")]
    path.write_text(line(kind="order of words"))
    assert read_pairs(path, PairOptions(phenomenon_column="kind"))[0].phenomenon == "order of words"
    with pytest.raises(
        UserError, match=r"row 1: 'sort' is None.*another column has it, give that as --phenomenon_column"
    ):
        read_pairs(path, PairOptions(phenomenon_column="sort"))
    path.write_text(line() + "\n" + json.dumps({"sentence_good": "kato", "sentence_bad": "to"}))
    with pytest.raises(UserError, match="row 2: 'UID' is None"):
        read_pairs(path, PairOptions())


def test_pairs_come_from_any_table(tmp_path):
    frame = pandas.DataFrame([{"sentence_good": 'kato "to"', "sentence_bad": "to, kato"}])
    frame.to_csv(tmp_path / "order.csv.gz", index=False)
    frame.to_csv(tmp_path / "order.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "order.parquet")
    for name, number in {"order.csv.gz": 2, "order.tsv": 2, "order.parquet": 1}.items():
        (found,) = read_pairs(tmp_path / name, PairOptions())
        assert found == Pair('kato "to"', "to, kato", "order", "", f"{tmp_path / name}, row {number}")


def test_each_pair_is_written_with_its_scores(tmp_path, exported, folder):
    (tmp_path / "data.jsonl").write_text(line() + "\n\n" + line(sentence_good="to", sentence_bad="to", UID="same"))
    output = tmp_path / "pairs.jsonl"
    evaluate_minimal_pairs(exported, [tmp_path / "data.jsonl"], options=PairOptions(pairs=output))
    first, second = (json.loads(row) for row in output.read_text().splitlines())
    good, bad = pseudo_log_likelihoods(folder, encode(folder, ["kato to", "to kato"])).tolist()
    assert first == {
        "good": "kato to",
        "bad": "to kato",
        "phenomenon": "order",
        "field": "syntax_semantics",
        "place": f"{tmp_path / 'data.jsonl'}, row 1",
        "good_score": pytest.approx(good, abs=1e-4),
        "bad_score": pytest.approx(bad, abs=1e-4),
        "margin": first["good_score"] - first["bad_score"],
        "correct": good > bad,
    }
    assert (second["place"], second["margin"], second["correct"]) == (f"{tmp_path / 'data.jsonl'}, row 3", 0, False)


def test_pairs_are_not_written_over_the_data_or_the_figures(tmp_path, exported):
    data = tmp_path / "data.jsonl"
    data.write_text(line())
    for pairs, figures, message in (
        (data, None, "--pairs .* is also the data or another output"),
        (None, data, "--json .* is also the data or another output"),
        (tmp_path / "out.json", tmp_path / "out.json", "is also the data or another output"),
        (tmp_path / "nothing/pairs.jsonl", None, "--pairs .* its folder is missing"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_minimal_pairs(exported, [data], json_path=figures, options=PairOptions(pairs=pairs))
    assert data.read_text() == line()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows: choose"),
        (line() + "\n{broken\n", "row 2: not valid JSON"),
        ("[1]", "row 1: not a JSON object"),
        (line() + "\n\n" + line(sentence_bad=None), "row 3: 'sentence_bad' is None"),
        (line(UID=" "), "row 1: 'UID' is ' '"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read_pairs(tmp_path / "data.jsonl", PairOptions())


def test_bytes_that_are_not_text_and_places_without_data_are_refused(tmp_path, exported):
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-16 by its first bytes"):
        read_pairs(tmp_path / "data.jsonl", PairOptions())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no table"):
        evaluate_minimal_pairs(exported, [tmp_path / "empty"])
    with pytest.raises(UserError, match="does not exist"):
        evaluate_minimal_pairs(exported, [tmp_path / "nothing"])
    with pytest.raises(UserError, match=r"--json .* is a folder, or its folder is missing"):
        evaluate_minimal_pairs(exported, [tmp_path], json_path=tmp_path / "nothing/out.json")


def test_a_sentence_longer_than_the_model_is_refused(folder):
    with pytest.raises(UserError, match=r"data\.jsonl, line 3: a sentence has \d+ tokens .* has 512 positions"):
        score_pairs(folder, [pair("kato", "to " * 600)], "original")


def test_sentences_beyond_the_trained_positions_are_reported(folder, caplog):
    score_pairs(folder, [pair("kato", "to " * LENGTH)], "original")
    assert f"1 sentences are longer than the {LENGTH} tokens that the model was trained on, first " in caplog.text


def test_a_model_whose_numbers_are_not_finite_is_refused(exported):
    broken = open_roberta(exported)
    with torch.no_grad():
        broken.model.lm_head.bias[7] = float("nan")
    with pytest.raises(UserError, match=r"of the model in '.*/model' are not finite"):
        score_pairs(broken, [pair("kato to", "to")], "original")


@pytest.fixture
def copied(tmp_path, exported):
    """A copy of the model's folder, to break."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in exported.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def without_mask(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<mask>", "<musk>"))


def of_another_kind(folder):
    path = folder / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    change_json(path, model={"type": "WordLevel", "vocab": model["vocab"], "unk_token": "<unk>"})


def without_head(folder):
    config = transformers.RobertaConfig(**hf_config(model_config("nano", 400, LENGTH)).to_dict())
    transformers.RobertaModel(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no model in"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json' cannot be read"),
        (lambda folder: change_json(folder / "config.json", model_type="bert"), "has the type 'bert'"),
        (lambda folder: (folder / "config.json").write_text('{"run": {}}'), "is a run's folder: choose .*/hf'"),
        (
            lambda folder: change_json(folder / "tokenizer_config.json", model_max_length="64"),
            "the model_max_length '64': it must be a number",
        ),
        (lambda folder: change_json(folder / "config.json", pad_token_id=5), "<pad> is 1.* is not the model's.*is 5"),
        (lambda folder: change_json(folder / "config.json", vocab_size=399), "400 ids.* is not the model's .399"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (without_mask, "has no <mask> token"),
        (of_another_kind, "has a model of type WordLevel"),
        (
            lambda folder: change_json(folder / "tokenizer.json", pre_tokenizer={"type": "Whitespace"}),
            "would lose text .Latin",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights in"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"none"), "weights in .* cannot be read"),
        (without_head, "lacks 'lm_head"),
    ],
)
def test_a_folder_that_cannot_be_evaluated_is_refused(copied, damage, message):
    damage(copied)
    with pytest.raises(UserError, match=message):
        open_roberta(copied)
