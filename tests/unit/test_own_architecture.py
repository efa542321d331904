"""A custom architecture: a RobertaConfig is read, checked, trained, planned and exported as transformers means it."""

import json
from dataclasses import fields

import pytest
import torch
import transformers
from transformers.activations import ACT2FN

from benchmarks.cost_model import meta_model, plan
from benchmarks.plan import parse_case
from ds_roberta.config import ModelConfig
from ds_roberta.errors import UserError
from ds_roberta.model.architecture import DEFAULTS, read_architecture
from ds_roberta.model.encoder import ACTIVATIONS
from ds_roberta.model.export import export, hf_config
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.training.initial_model import InitialModel
from ds_roberta.training.settings import RunConfig, model_origin, pretrain_options, run_config

TOKENS = 400
SIZES = {"num_hidden_layers": 3, "hidden_size": 96, "num_attention_heads": 6, "intermediate_size": 200}
OWN = {"vocab_size": TOKENS, "max_position_embeddings": 300, "layer_norm_eps": 1e-5, **SIZES}
ARCHITECTURES = [
    {"hidden_act": "relu", "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0.2},
    {"hidden_act": "gelu_new", "vocab_size": 448, "type_vocab_size": 1},  # a table larger than the tokenizer's
    {"hidden_act": "silu", "layer_norm_eps": 1e-12, "initializer_range": 0.05},
    {"hidden_act": "prelu", "num_hidden_layers": 1, "hidden_size": 21, "num_attention_heads": 3},  # heads of 7
    {"hidden_act": "gelu", "num_attention_heads": 1, "intermediate_size": 7, "max_position_embeddings": 42},
]


def ids_of(changes):
    return "-".join(str(value) for value in changes.values())


@pytest.fixture
def config_of(tmp_path):
    """A function that saves a RobertaConfig as transformers does; its folder."""

    def save(**changes):
        transformers.RobertaConfig(**{**OWN, **changes}).save_pretrained(tmp_path / "mine")
        return tmp_path / "mine"

    return save


@pytest.fixture
def write_config(tmp_path):
    """A function that writes a config.json by hand; its path."""

    def write(**content):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"model_type": "roberta", **content}))
        return path

    return write


def settings(model, corpus, **options) -> RunConfig:
    given = {"output_dir": corpus.folder / "run", "max_steps": 50, **options}
    return run_config(pretrain_options(corpus.folder, model=str(model), **given), corpus, 8, False, None)


def test_steps_may_be_percents_of_the_run(corpus):
    percents = {"warmup_steps": "5.9%", "decay_steps": "20%", "max_seq_length_schedule": "0:16,59%:32"}
    steps = {"warmup_steps": 2, "decay_steps": 10, "max_seq_length_schedule": "0:16,29:32"}
    options = {"max_seq_length": 32, "lr_scheduler_type": "warmup_stable_decay"}
    assert settings("tiny", corpus, **options, **percents) == settings("tiny", corpus, **options, **steps)
    for wrong in ("6 %", "a%", "1e2", "-6%", ""):
        with pytest.raises(UserError, match=r"--warmup_steps must be a number of steps, or a percent .* got '"):
            settings("tiny", corpus, warmup_steps=wrong)
    with pytest.raises(UserError, match=r"--warmup_steps must be from 0 to max_steps \(50\), got 51"):
        settings("tiny", corpus, warmup_steps="102%")


def test_defaults_are_those_of_transformers():
    theirs = transformers.RobertaConfig()
    assert {name: getattr(theirs, name) for name in DEFAULTS} == DEFAULTS
    assert DEFAULTS.keys() == {field.name for field in fields(ModelConfig)}


def test_activations_are_those_of_transformers():
    assert set(ACT2FN) - set(ACTIVATIONS) <= {"xielu"}
    for name in ACTIVATIONS:
        results = []
        for function in (ACTIVATIONS[name], ACT2FN[name]):
            values = torch.linspace(-12, 12, 997, dtype=torch.float64, requires_grad=True)
            function = function().double() if isinstance(function, type) else function
            output = function.double()(values) if isinstance(function, torch.nn.Module) else function(values)
            output.sum().backward()
            results.append((output.detach(), values.grad))
        torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("changes", ARCHITECTURES, ids=ids_of)
def test_logits_and_gradients_equal_those_of_transformers(config_of, corpus, changes):
    config = read_architecture(config_of(**changes) / "config.json", corpus.manifest.tokenizer)
    torch.manual_seed(0)
    ours = MaskedLM(config)
    theirs = transformers.RobertaForMaskedLM(transformers.RobertaConfig.from_pretrained(config_of(**changes)))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert dict(theirs.named_parameters()).keys() == dict(ours.named_parameters()).keys()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    theirs.tie_weights()
    ids = torch.randint(4, TOKENS, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(40) < torch.tensor([[40], [25]])
    ids[~mask] = 1
    positions = mask.flatten().nonzero().flatten()[::5]
    labels = torch.full_like(ids, -100)
    labels.view(-1)[positions] = ids.view(-1)[positions]
    for model in (ours.double().eval(), theirs.double().eval()):
        model.zero_grad()
    loss = ours.lm_head(  # its own loss is summed in float32
        ours.roberta(ids, mask).flatten(0, 1)[positions], ours.roberta.embeddings.word_embeddings.weight
    )
    torch.nn.functional.cross_entropy(loss, ids.view(-1)[positions]).backward()
    theirs(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("changes", ARCHITECTURES[:4], ids=ids_of)
def test_an_export_keeps_the_architecture_and_is_begun_with(tmp_path, config_of, corpus, changes):
    run = settings(config_of(**changes), corpus)
    torch.manual_seed(0)
    weights = {name: parameter.detach() for name, parameter in MaskedLM(run.model).named_parameters()}
    export(run.model, weights, corpus.folder / "tokenizer", 48, tmp_path / "exported", "")
    written = json.loads((tmp_path / "exported/config.json").read_text())
    assert {name: written[name] for name in {**OWN, **changes}} == {**OWN, **changes}
    assert InitialModel.open(tmp_path / "exported").config == run.model
    assert settings(tmp_path / "exported", corpus).model == run.model  # its config alone


def test_a_run_takes_length_name_and_recipe_from_a_config(config_of, write_config, corpus):
    run = settings(config_of(), corpus)
    assert (run.packing.max_seq_length, run.schedule.warmup_steps, run.model_name) == (298, 3, "mine")
    assert settings(config_of() / "config.json", corpus) == run
    assert settings(config_of(max_position_embeddings=2050), corpus).packing.max_seq_length == 512
    assert settings(config_of(max_position_embeddings=2050), corpus, max_seq_length=2048).packing.max_seq_length == 2048
    assert settings(config_of(), corpus, hidden_dropout_prob=0.3).model.hidden_dropout_prob == 0.3
    bare = settings(write_config(), corpus).model  # what the data knows, and transformers' defaults
    assert (bare.vocab_size, bare.hidden_size, bare.layer_norm_eps) == (TOKENS, 768, 1e-12)
    whole = settings(write_config(layer_norm_eps=1, initializer_range=2), corpus).model
    assert (hf_config(whole).layer_norm_eps, hf_config(whole).initializer_range) == (1.0, 2.0)  # its type takes no int
    renamed = write_config(**SIZES).rename(config_of() / "narrow.json")
    assert settings(renamed, corpus).model_name == "narrow"


def test_a_run_logs_the_sizes_and_which_fields_are_not_used(write_config, corpus):
    path = write_config(**SIZES, n_layer=12, use_cache=True, is_decoder=False)
    line = model_origin(str(path), settings(path, corpus).model, False)
    assert "3 layers of width 96, 6 heads, MLP of 200 with gelu, 400 ids, 510 tokens at most" in line
    assert "the weights are random: --init_from starts from trained ones; not used: n_layer, use_cache)" in line


def test_all_problems_of_a_config_are_named_at_once(write_config, corpus):
    path = write_config(
        num_attention_heads=5, vocab_size=399, bos_token_id=3, is_decoder=True, tie_word_embeddings=False, **{
            "hidden_size": 96, "position_embedding_type": "relative_key", "chunk_size_feed_forward": 8
        }
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        settings(path, corpus)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"'{path}': ") for line in lines)
    assert [line.partition(": ")[2] for line in lines] == [
        "hidden_size 96 is not a multiple of num_attention_heads 5: 95 and 100 are",
        "vocab_size 399 is less than the 400 ids of the data's tokenizer: raise it, or remove it",
        "bos_token_id is 3, 0 in the data's tokenizer: change it, or remove it",
        "is_decoder is True: only False can be trained here; set it to that, or remove it",
        "position_embedding_type is 'relative_key': only 'absolute' can be trained here; set it to that, or remove it",
        "tie_word_embeddings is False: only True can be trained here; set it to that, or remove it",
        "chunk_size_feed_forward is 8: only 0 can be trained here; set it to that, or remove it",
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number from 1 to 2147483647, got 0"),
        ({"hidden_size": 96.0}, "hidden_size must be a whole number from 1 to 2147483647, got 96.0"),
        ({"vocab_size": 10**12}, "vocab_size must be a whole number from 1 to 2147483647, got 1000000000000"),
        ({"hidden_dropout_prob": 1}, "hidden_dropout_prob must be at least 0 and below 1, got 1"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be a positive number, got nan"),
        ({"layer_norm_eps": 10**400}, "layer_norm_eps must be a positive number, got 1000"),
        ({"initializer_range": True}, "initializer_range must be a positive number, got True"),
        ({"pad_token_id": None}, "pad_token_id must be a token's id, a whole number from 0 up, got None"),
        ({"eos_token_id": [2, 3]}, "eos_token_id must be a token's id"),
        ({"hidden_act": "xielu"}, "hidden_act must be one of gelu, .*got 'xielu'"),
        ({"hidden_act": ["gelu"]}, "hidden_act must be one of"),
        ({"max_position_embeddings": 2}, "max_position_embeddings 2 leaves no position"),
        ({"vocab_size": 2}, "eos_token_id 2 is not among the 2 ids of the vocabulary"),
        ({"model_type": "bert"}, "model_type is 'bert', but only 'roberta' can be trained"),
        ({"model_type": None, "run": {}}, "model_type is missing"),
    ],
)
def test_a_config_that_cannot_be_trained_is_refused(write_config, corpus, content, words):
    with pytest.raises(UserError, match=words):
        settings(write_config(**content), corpus)


def test_a_file_that_is_no_config_is_refused(tmp_path, corpus):
    cases = [("{", "cannot be read"), ("[]", "not a JSON object"), ('{"run": {}}', "a run's record")]
    for content, words in [*cases, ("[" * 100_000, "cannot be read")]:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=words):
            settings(tmp_path, corpus)
    with pytest.raises(UserError, match=r"'huge' is none of nano, tiny, .*, large, and there is no file 'huge'"):
        settings("huge", corpus)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"max_seq_length": 299},
            "--max_seq_length 299 is more than the 298 .* max_position_embeddings, 300",
        ),
        ({"max_steps": None}, "comes without a training recipe: give --output_dir and --max_steps"),
        ({"output_dir": None}, "comes without a training recipe: give --output_dir and --max_steps"),
        ({"remap_token_embeddings": True}, "--remap_token_embeddings needs --init_from"),
    ],
)
def test_options_that_do_not_fit_a_config_are_named(config_of, corpus, options, words):
    with pytest.raises(UserError, match=words):
        settings(config_of(), corpus, **options)


def test_a_run_of_ones_own_architecture_is_planned(config_of, capsys):
    case = parse_case(["--model", str(config_of(hidden_act="quick_gelu")), "--gpus", "2"])
    expected = sum(parameter.numel() for parameter in meta_model(case.config).parameters())
    assert plan(case).parameters == expected
    assert (case.max_seq_length, case.config.vocab_size, case.config.hidden_act) == (298, TOKENS, "quick_gelu")
    for words, message in (
        (["--max_seq_length", "299"], "more than the 298"),
        (["--vocab_size", "500"], "--vocab_size is in the config"),
        (["--model", "huge"], "'huge' is none of nano, tiny, small, base, large"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parse_case(["--model", str(config_of()), *words])
        assert message in capsys.readouterr().err


def test_transformers_sees_the_same_config(config_of):
    config = read_architecture(config_of(hidden_act="gelu_10") / "config.json")
    theirs, ours = transformers.RobertaConfig.from_pretrained(config_of(hidden_act="gelu_10")), hf_config(config)
    assert {name: getattr(ours, name) for name in DEFAULTS} == {name: getattr(theirs, name) for name in DEFAULTS}
