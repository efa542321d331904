"""A run starts with the weights of another model, resized as asked."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ds_roberta.config import ModelConfig, PackingConfig
from ds_roberta.data.manifest import TOKENIZER_FOLDER
from ds_roberta.data.tokenizer import TokenizerInfo
from ds_roberta.data.tokenizer_files import training_tokenizer
from ds_roberta.errors import UserError
from ds_roberta.model.initialization import look_at_neighbours
from ds_roberta.model.objectives import MaskedLM, find_objective
from ds_roberta.model.weights import POSITION_EMBEDDINGS
from ds_roberta.training.initial_model import InitialModel
from ds_roberta.training.settings import pretrain_options, run_config
from preprocessing.tokens.bpe import train_bpe

LENGTH = 48
TOKENS = 400
LONG = {"max_seq_length": 2 * LENGTH, "extend_positions": True}


def hub_config(**changes):
    """A small model whose MLP is not four times as wide, as some of the hub's."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 80}
    settings = {"vocab_size": TOKENS, "max_position_embeddings": LENGTH + 2, "type_vocab_size": 2, **sizes}
    return transformers.RobertaConfig(**{"layer_norm_eps": 1e-5, **settings, **changes})


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory, tokenizer_folder):
    """A folder as hubs have them: a pooler, half precision, a tokenizer without a length."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub") / "model"
    model = transformers.RobertaForMaskedLM(hub_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.half().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["roberta.pooler.dense.weight"] = torch.zeros(32, 32, dtype=torch.float16)
    weights["roberta.embeddings.position_ids"] = torch.arange(LENGTH + 2)[None]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(tokenizer_folder / "tokenizer.json", folder)
    return folder


@pytest.fixture
def copied(tmp_path, hub_folder):
    return shutil.copytree(hub_folder, tmp_path / "copied")


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory):
    """A tokenizer of 320 ids, trained on real words: it shares some tokens with the one of made-up words."""
    folder = tmp_path_factory.mktemp("other") / "tokenizer"
    folder.mkdir()
    train_bpe(iter([[InitialModel.initialize.__doc__ + InitialModel.resized.__doc__ + __doc__] * 3]), 320, folder)
    return folder


@pytest.fixture(scope="module")
def other_corpus(tmp_path_factory, corpus, other_tokenizer):
    """The corpus as if it had been made with that tokenizer."""
    folder = tmp_path_factory.mktemp("other") / "corpus"
    shutil.copytree(other_tokenizer, folder / TOKENIZER_FOLDER)
    tokenizer = TokenizerInfo.read(folder / TOKENIZER_FOLDER)
    return SimpleNamespace(folder=folder, manifest=SimpleNamespace(tokenizer=tokenizer))


def begin(folder, corpus, packing=PackingConfig.format, **options):
    """The model and its configuration of a run that begins with a folder, as `run.pretrain` makes it."""
    initial = InitialModel.open(folder)
    given = {"max_steps": 100, "output_dir": folder.parent / "run", "packing": packing, **options}
    run = run_config(pretrain_options(folder, init_from=folder, **given), corpus, 8, False, initial)
    torch.manual_seed(5)
    model = find_objective(run.objective, run.packing)(run.model).eval()
    told = initial.initialize(model, run, corpus)
    return model, run, told


def inputs(length, high=TOKENS):
    ids = torch.randint(5, high, (3, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[2, length // 2 :] = False
    ids[~mask] = 1
    return ids, mask


def all_logits(model, ids, mask):
    with torch.no_grad():
        return model.logits(ids, mask, mask.flatten().nonzero().flatten())


def transformers_logits(folder, ids, mask):
    model = transformers.RobertaForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[mask]


def test_the_logits_of_step_0_are_transformers(hub_folder, corpus):
    model, run, told = begin(hub_folder, corpus)
    ids, mask = inputs(LENGTH)
    torch.testing.assert_close(
        all_logits(model, ids, mask), transformers_logits(hub_folder, ids, mask), rtol=0, atol=2e-5
    )
    assert run.model == ModelConfig(TOKENS, 2, 32, 4, LENGTH + 2, type_vocab_size=2, intermediate_size=80)
    assert (run.packing.max_seq_length, run.schedule.warmup_steps, run.model_name) == (LENGTH, 6, "model")
    assert told == [f"the weights are those in {hub_folder}"]


def test_extended_positions_change_nothing_within_the_old_length(hub_folder, corpus):
    model, run, told = begin(hub_folder, corpus, **LONG)
    assert run.model.max_position_embeddings == 2 * LENGTH + 2
    ids, mask = inputs(LENGTH)
    torch.testing.assert_close(
        all_logits(model, ids, mask), transformers_logits(hub_folder, ids, mask), rtol=0, atol=2e-5
    )
    assert f"positions from {LENGTH} to {2 * LENGTH - 1} begin as copies of the {LENGTH} before" in told
    rows = model.roberta.embeddings.position_embeddings.weight
    assert torch.equal(rows[2 : LENGTH + 2], rows[LENGTH + 2 :])


def test_positions_that_are_sinusoids_stay_so_unless_they_are_extended(copied, corpus):
    def is_fixed(**options):
        initial = InitialModel.open(copied)
        given = {"max_steps": 100, "output_dir": copied.parent / "run", **options}
        options = pretrain_options(copied, init_from=copied, **given)
        return initial.has_fixed_positions(run_config(options, corpus, 8, False, initial))

    assert not is_fixed()
    ours = MaskedLM(InitialModel.open(copied).config)
    look_at_neighbours(ours.roberta, 0.02)
    model = transformers.RobertaForMaskedLM.from_pretrained(copied, dtype=torch.float32)
    model.load_state_dict({POSITION_EMBEDDINGS: ours.get_parameter(POSITION_EMBEDDINGS)}, strict=False)
    model.save_pretrained(copied)
    assert is_fixed()
    assert not is_fixed(**LONG)


def test_lengths_far_beyond_1024(hub_folder, corpus):
    model, run, _ = begin(hub_folder, corpus, max_seq_length=2048, extend_positions=True)
    assert run.model.max_position_embeddings == 2050
    ids, mask = inputs(2048)
    logits = all_logits(model, ids, mask)
    assert logits.isfinite().all()


def test_our_own_exported_folder_says_what_was_trained(copied, corpus):
    """Its table is longer than what its tokenizer truncates to: positions beyond that are replaced."""
    (copied / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 32}))
    assert begin(copied, corpus)[1].packing.max_seq_length == 32
    model, run, _ = begin(copied, corpus, max_seq_length=40, extend_positions=True)
    assert run.model.max_position_embeddings == LENGTH + 2
    rows = model.roberta.embeddings.position_embeddings.weight
    assert torch.equal(rows[2:10], rows[34:42])


def test_pickled_weights_are_read_where_they_are_tensors_alone(copied, corpus, hub_folder):
    weights = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    torch.save(weights, copied / "pytorch_model.bin")
    model, *_ = begin(copied, corpus)
    expected, *_ = begin(hub_folder, corpus)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    torch.save({**weights, "evil": print}, copied / "pytorch_model.bin")
    with pytest.raises(UserError, match="hold more than tensors, which could run code"):
        begin(copied, corpus)


def test_a_head_that_the_folder_lacks_is_new(hub_folder, corpus):
    model, _, told = begin(hub_folder, corpus, packing="segment-pair")
    assert told[1:] == ["next_sentence_head initialized at random"]
    assert model.next_sentence_head.pooler.weight.detach().std() == pytest.approx(0.02, rel=0.1)
    expected, *_ = begin(hub_folder, corpus)
    assert torch.equal(model.lm_head.dense.weight, expected.lm_head.dense.weight)


def test_another_vocabulary_is_mapped_by_the_tokens_texts(
    hub_folder, corpus, other_corpus, other_tokenizer, tokenizer_folder
):
    with pytest.raises(
        UserError, match=r"made with another tokenizer than .* in the model\).*--remap_token_embeddings"
    ):
        begin(hub_folder, other_corpus)
    model, run, told = begin(hub_folder, other_corpus, remap_token_embeddings=True)
    assert run.model.vocab_size == 320
    old, new = training_tokenizer(tokenizer_folder), training_tokenizer(other_tokenizer)
    before, now = old.get_vocab(), new.get_vocab()
    shared = before.keys() & now.keys()
    assert 261 < len(shared) < 320
    assert f"embeddings of {len(shared)} tokens are copied, those of {320 - len(shared)} are the mean" in told[1]
    expected, *_ = begin(hub_folder, corpus)
    was, rows = (m.roberta.embeddings.word_embeddings.weight for m in (expected, model))
    for token in shared:
        assert torch.equal(rows[now[token]], was[before[token]])
        assert model.lm_head.bias[now[token]] == expected.lm_head.bias[before[token]]
    token = min(now.keys() - before.keys())
    text = new.decode([now[token]])
    ids = old.encode(text, add_special_tokens=False).ids
    assert len(ids) > 1
    torch.testing.assert_close(rows[now[token]], was[ids].mean(0))
    with pytest.raises(UserError, match="--remap_token_embeddings does nothing"):
        begin(hub_folder, corpus, remap_token_embeddings=True)


def test_weights_without_masked_lm_head_are_mapped_too(hub_folder, corpus, other_corpus, monkeypatch):
    """A checkpoint of token substitution has such weights."""
    read = InitialModel._weights
    monkeypatch.setattr(
        InitialModel,
        "_weights",
        lambda self: {name: weight for name, weight in read(self).items() if not name.startswith("lm_head.")},
    )
    model, *_ = begin(hub_folder, other_corpus, remap_token_embeddings=True, objective="rts")
    assert model.roberta.embeddings.word_embeddings.weight.shape[0] == 320


def test_the_mapped_model_says_of_shared_tokens_what_it_said(
    hub_folder, corpus, other_corpus, other_tokenizer, tokenizer_folder
):
    """The logits of the same text, in tokens that both vocabularies have, are the same numbers."""
    model, *_ = begin(hub_folder, other_corpus, remap_token_embeddings=True, **LONG)
    expected, *_ = begin(hub_folder, corpus, **LONG)
    before, now = training_tokenizer(tokenizer_folder).get_vocab(), training_tokenizer(other_tokenizer).get_vocab()
    tokens = sorted((before.keys() & now.keys()) - {"<pad>"})
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(2))[:60]
    mask = torch.ones(1, 60, dtype=torch.bool)
    found = all_logits(model, torch.tensor([[now[tokens[i]] for i in order]]), mask)
    wanted = all_logits(expected, torch.tensor([[before[tokens[i]] for i in order]]), mask)
    torch.testing.assert_close(found[:, [now[t] for t in tokens]], wanted[:, [before[t] for t in tokens]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_length": LENGTH + 1}, f"{LENGTH + 1} is more than the {LENGTH} positions .* or --extend_positions"),
        ({"extend_positions": True}, "--extend_positions does nothing"),
        ({"model": "tiny"}, "--model tiny does nothing with --init_from"),
        ({"initial_attention": "neighbours"}, "--initial_attention neighbours does nothing with --init_from"),
        ({"initial_bias": "frequencies"}, "--initial_bias frequencies does nothing with --init_from"),
        ({"max_steps": None}, "give --output_dir and --max_steps"),
    ],
)
def test_options_that_do_not_fit_the_model_are_named(hub_folder, corpus, options, message):
    with pytest.raises(UserError, match=message):
        begin(hub_folder, corpus, **options)


def test_a_recipe_leaves_the_models_weights_as_they_are(hub_folder, corpus):
    usual, own = (begin(hub_folder, corpus, recipe=recipe)[:2] for recipe in (None, "fast"))
    assert (own[1].initial_attention, own[1].initial_bias) == ("random", "zero")
    assert own[1].masking.mlm_probability == 0.4
    for before, after in zip(usual[0].state_dict().values(), own[0].state_dict().values(), strict=True):
        assert torch.equal(before, after)


def test_options_of_the_initial_model_need_one(corpus):
    options = pretrain_options(corpus.folder, extend_positions=True)
    with pytest.raises(UserError, match="--extend_positions needs --init_from: give both"):
        run_config(options, corpus, 8, False, None)


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def no_config(folder):
    (folder / "config.json").unlink()


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def other_setting(**settings):
    def change(folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **settings}))

    return change


def changed_weights(**changes):
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        for name, function in changes.items():
            key = next(key for key in weights if key.endswith(name.replace("__", ".")))
            weights[key] = function(weights[key])
        save_file(
            {name: weight for name, weight in weights.items() if weight is not None},
            folder / "model.safetensors",
            {"format": "pt"},
        )

    return change


def part_of_a_checkpoint(folder):
    (folder / "train_state.json").write_text("{}")


def a_run(folder):
    (folder / "checkpoints").mkdir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_weights, r"no weights in .*model\.safetensors"),
        (no_config, "config.json is missing"),
        (no_tokenizer, "tokenizer.json is missing"),
        (other_setting(model_type="bert"), "has the type 'bert'"),
        (other_setting(hidden_act="xielu"), "hidden_act must be one of .*, got 'xielu'"),
        (other_setting(tie_word_embeddings=False), "tie_word_embeddings is False: only True"),
        (other_setting(vocab_size=10), "is not the model's"),
        (other_setting(hidden_size=34), "hidden_size 34 is not a multiple of num_attention_heads 4: 32 and 36 are"),
        (changed_weights(query__weight=lambda w: w.to(torch.int8)), "dtype torch.int8"),
        (changed_weights(query__weight=lambda w: w * float("nan")), "is not finite"),
        (changed_weights(lm_head__dense__weight=lambda w: None), "lacks 'lm_head.dense.weight'"),
        (a_run, "is a run's folder, which may change"),
        (part_of_a_checkpoint, r"is not a whole checkpoint \(manifest.json is missing\): copy it again"),
    ],
)
def test_a_folder_that_cannot_be_begun_with_is_named(copied, corpus, change, message):
    change(copied)
    with pytest.raises(UserError, match=message) as caught:
        begin(copied, corpus)
    assert str(copied) in str(caught.value)


def test_the_fingerprint_is_of_the_weights(hub_folder, copied):
    before = InitialModel.open(hub_folder).fingerprint
    assert InitialModel.open(copied).fingerprint == before
    changed_weights(lm_head__dense__bias=lambda w: w + 1)(copied)
    assert InitialModel.open(copied).fingerprint != before
