"""XLM-R and CamemBERT: opened, continued, exported and fine-tuned as transformers' own classes."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from unigram_folders import save_model

from ds_roberta.config import MaskingConfig, ModelConfig, PackingConfig
from ds_roberta.data.manifest import TOKENIZER_FOLDER
from ds_roberta.data.masking import training_masker
from ds_roberta.data.shards import Corpus
from ds_roberta.data.tokenizer import TokenizerInfo, in_the_alphabet_of, token_bytes
from ds_roberta.data.words import word_flags
from ds_roberta.evaluation.minimal_pairs import Pair, score_pairs
from ds_roberta.evaluation.perplexity import held_out_perplexity
from ds_roberta.evaluation.pseudo_likelihood import encode, pseudo_log_likelihoods
from ds_roberta.evaluation.roberta_folder import open_roberta
from ds_roberta.finetuning.classification import Classification
from ds_roberta.finetuning.predict import PredictConfig, predict
from ds_roberta.finetuning.question_answering import make_windows, span_labels
from ds_roberta.finetuning.squad import Question
from ds_roberta.finetuning.tagged_sentences import Sentence
from ds_roberta.finetuning.token_classification import make_word_windows
from ds_roberta.model.architecture import read_architecture
from ds_roberta.model.encoder import RobertaModel
from ds_roberta.model.export import export, hf_config, to_transformers
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.training.initial_model import InitialModel
from ds_roberta.training.settings import pretrain_options, run_config
from ds_roberta.transformers_folder import open_tokenizer, read_model
from preprocessing.commands import shard
from preprocessing.tokens.corpus_tokenizer import copy_tokenizer
from preprocessing.units import ShardOptions

FAMILIES = {"xlm-roberta": "XLMRoberta", "camembert": "Camembert"}
TEXTS = ["Les élèves étudient.", "Der Schüler lernt heute 🙂", "我们今天去北京。"]
DOCUMENTS = [f"Les élèves {number} étudient à l'école.\nDer Schüler lernt heute {number}." for number in range(40)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for model_type, family in FAMILIES.items():
        save_model(root / model_type, family)
        (root / f"{model_type}.txt").write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
        options = ShardOptions(validation_fraction=0.3)
        shard([str(root / f"{model_type}.txt")], root / model_type, root / f"{model_type}-data", options, workers=1)
    return root


@pytest.fixture(params=FAMILIES)
def model_type(request):
    return request.param


@pytest.fixture
def folder(folders, model_type):
    return folders / model_type


@pytest.fixture
def corpus(folders, model_type):
    return Corpus.open(folders / f"{model_type}-data")


def begin(folder, corpus, **options):
    initial = InitialModel.open(folder)
    given = {"max_steps": 100, "output_dir": folder.parent / "run", **options}
    run = run_config(pretrain_options(folder, init_from=folder, **given), corpus, 8, False, initial)
    model = MaskedLM(run.model).eval()
    return model, run, initial.initialize(model, run, corpus)


def logits(folder, text):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits[0]


def test_scores_of_sentences_are_those_of_transformers(folder, model_type):
    opened = open_roberta(folder)
    assert type(opened.model) is getattr(transformers, f"{FAMILIES[model_type]}ForMaskedLM")
    assert (opened.max_positions, opened.max_seq_length) == (62, 62)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        expected = 0.0
        for place in range(1, ids.shape[1] - 1):
            masked = ids.clone()
            masked[0, place] = tokenizer.mask_token_id
            with torch.no_grad():
                found = model(masked).logits[0, place]
            expected += found.log_softmax(-1)[ids[0, place]].item()
        assert pseudo_log_likelihoods(opened, encode(opened, [text]))[0] == pytest.approx(expected, abs=1e-3)
    words = encode(opened, ["Les élèves étudient"])[0].words
    assert len(set(words)) == 3 < len(words)
    scores = score_pairs(opened, [Pair(*TEXTS[:2], "a", "", "here")], "original")
    assert scores[0].tolist() == pseudo_log_likelihoods(opened, encode(opened, TEXTS[:2])).tolist()


def test_a_run_continues_with_its_logits_and_exports_its_class(folder, corpus, model_type, tmp_path):
    model, run, _ = begin(folder, corpus)
    assert run.model.model_type == model_type
    assert run.packing.max_seq_length == 62
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    export(run.model, weights, corpus.folder / TOKENIZER_FOLDER, 62, tmp_path / "model", "card")
    before, after = (json.loads((each / "config.json").read_text()) for each in (folder, tmp_path / "model"))
    for name in ("architectures", "model_type", "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"):
        assert after[name] == before[name]
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert type(exported) is type(transformers.AutoTokenizer.from_pretrained(folder))
    for text in TEXTS:
        torch.testing.assert_close(logits(tmp_path / "model", text), logits(folder, text), rtol=0, atol=1e-5)
    ids = exported(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        own = model.logits(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(ids.shape[1]))
    torch.testing.assert_close(own, logits(folder, TEXTS[0]), rtol=0, atol=1e-5)


def test_perplexity_of_a_fresh_model_is_about_that_of_a_guess(folder, corpus):
    opened = open_roberta(folder)
    for unit in ("token", "whole-word"):
        found = held_out_perplexity(opened, corpus, PackingConfig(62), MaskingConfig(unit=unit), 100)
        assert found.loss == pytest.approx(np.log(corpus.manifest.tokenizer.vocab_size), rel=0.05)


def test_whole_words_are_masked(folder, corpus):
    info = corpus.manifest.tokenizer
    texts, flags = token_bytes(folder), word_flags(folder, info.vocab_size)
    ids = np.array(transformers.AutoTokenizer.from_pretrained(folder)(" ".join(TEXTS[:2]))["input_ids"])
    masker = training_masker(
        MaskingConfig(unit="whole-word", mask_replace_prob=1.0, random_replace_prob=0.0), info, 0, flags
    )
    whole = 0
    for place in range(50):
        masked = ids[None].copy()
        masker.mask(masked, np.array([place]))
        is_masked = masked[0] == info.mask_token_id
        begins = np.array([texts[id_].startswith(b" ") or id_ in info.special_ids for id_ in ids.tolist()])
        words = np.cumsum(begins | np.append(False, np.isin(ids[:-1], info.special_ids)))
        assert not is_masked[np.isin(ids, info.special_ids)].any()
        for word in np.unique(words[is_masked]):
            assert is_masked[words == word].all()
            whole += (words == word).sum() > 1
    assert whole


def test_a_config_sets_the_type(folder, corpus, model_type):
    config = read_architecture(folder / "config.json", corpus.manifest.tokenizer)
    assert (config.model_type, config.type_vocab_size) == (model_type, 1)
    assert hf_config(config).model_type == model_type
    encoder = {f"roberta.{name}": weight for name, weight in RobertaModel(config).named_parameters()}
    assert type(to_transformers(config, encoder)) is getattr(transformers, f"{FAMILIES[model_type]}Model")
    own = getattr(transformers, f"{FAMILIES[model_type]}Config")()
    path = folder.parent / f"{model_type}.json"
    path.write_text(json.dumps({"model_type": model_type}))
    assert read_architecture(path).vocab_size == own.vocab_size
    assert ModelConfig(400, 1, 8, 1).model_type == "roberta"


@pytest.mark.parametrize("to_unigram", [True, False])
def test_embeddings_are_mapped_between_the_two_kinds_of_tokenizer(
    folder, corpus, model_type, roberta_folder, tokenizer_folder, tmp_path, to_unigram
):
    copy_tokenizer(tokenizer_folder, tmp_path / TOKENIZER_FOLDER)
    info = TokenizerInfo.read(tmp_path / TOKENIZER_FOLDER)
    byte_level = SimpleNamespace(folder=tmp_path, manifest=SimpleNamespace(tokenizer=info))
    old, data = (roberta_folder, corpus) if to_unigram else (folder, byte_level)
    model, run, told = begin(old, data, remap_token_embeddings=True)
    before = read_model(old, transformers.RobertaForMaskedLM).state_dict()["roberta.embeddings.word_embeddings.weight"]
    rows = model.roberta.embeddings.word_embeddings.weight
    texts_before, texts = token_bytes(old), token_bytes(data.folder / TOKENIZER_FOLDER)
    ids = {text: id_ for id_, text in texts_before.items()}
    shared = {id_: ids[text] for id_, text in texts.items() if text in ids}
    assert {b" ", b"<mask>", b"a", b"."} <= {texts[id_] for id_ in shared}
    for id_, old_id in shared.items():
        assert torch.equal(rows[id_], before[old_id])
    assert f"embeddings of {len(shared)} tokens are copied" in told[1]
    word, pieces = ("▁le", " le") if to_unigram else ("Ġka", " ka")
    new_vocabulary = transformers.AutoTokenizer.from_pretrained(data.folder / TOKENIZER_FOLDER).get_vocab()
    expected = torch.stack([before[ids[letter.encode()]] for letter in pieces]).mean(0)
    torch.testing.assert_close(rows[new_vocabulary[word]], expected)
    assert run.model.vocab_size == len(texts)
    if not to_unigram:  # of a character that the old tokenizer does not know, nothing is known
        unknown = next(id_ for id_, text in texts.items() if text == b"\x01")
        torch.testing.assert_close(rows[unknown], before.mean(0))


def test_parts_of_characters_have_no_place_in_a_unigram(folder, tokenizer_folder):
    numbers = {text: id_ for id_, text in token_bytes(tokenizer_folder).items()}
    asked = {"a": numbers[b"\xc3"], "b": numbers[b" ka"], "<new>": 1000}
    assert in_the_alphabet_of(folder, asked, tokenizer_folder) == {"▁ka": numbers[b" ka"], "<new>": 1000}


@pytest.fixture
def tuned(folder, tmp_path, model_type):
    family = FAMILIES[model_type]
    shutil.copytree(folder, tmp_path / "tuned")
    names = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}, "num_labels": 2}
    config = getattr(transformers, f"{family}Config").from_pretrained(folder, **names)
    torch.manual_seed(1)
    getattr(transformers, f"{family}ForSequenceClassification")(config).save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def test_predictions_are_those_of_transformers(tuned, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    answers = predict(PredictConfig(tuned, tmp_path / "in.jsonl"))
    classify = transformers.pipeline("text-classification", model=str(tuned), device="cpu")
    for answer, theirs in zip(answers, classify(TEXTS), strict=True):
        assert answer.row["label"] == theirs["label"]
        assert max(answer.row["scores"].values()) == pytest.approx(theirs["score"], abs=1e-4)


def test_a_new_head_is_put_on_the_models_own_class(folder, model_type):
    model = read_model(folder, transformers.RobertaForSequenceClassification, changes={"num_labels": 3})
    assert type(model) is getattr(transformers, f"{FAMILIES[model_type]}ForSequenceClassification")
    assert not Classification.fits(model.config)  # as the folder's config has it
    model.config.architectures = [type(model).__name__]  # as it is saved
    assert Classification.fits(model.config)


def test_words_and_contexts_become_tokens(folder):
    tokenizer = open_tokenizer(folder, add_prefix_space=True)
    words = ("Les", "élèves", "\u200b", "étudient")
    (window,) = make_word_windows(tokenizer, [Sentence("here", words, ("O",) * 4)], 30)
    at = [window.input_ids[place] for place in window.positions]
    expected = [tokenizer(word, add_special_tokens=False)["input_ids"][:1] or [3] for word in words]
    assert at == [first for (first,) in expected]
    assert len(set(window.positions)) == 4
    context = "Der Schüler  lernt ﬁn\u00a0heute in der Schule."
    for answer in ("Schüler", "lernt", "heute", "der Schule"):
        question = Question("here", "1", "Où ?", context, (answer,), context.index(answer))
        (window,) = make_windows(tokenizer, [question], 60, 20)
        first, last = span_labels(window, question)
        start, end = window.offsets[first - window.first][0], window.offsets[last - window.first][1]
        assert context[start:end] == answer
