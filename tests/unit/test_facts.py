from dataclasses import asdict
from pathlib import Path

import pytest

from ds_roberta.config import MaskingConfig, PackingConfig
from ds_roberta.errors import UserError
from ds_roberta.training.facts import check_identity, completed_identity

RUN = Path("run")
IDENTITY = {
    "data": "abc",
    "seed": 3,
    "model": {"hidden_size": 4, "hidden_dropout_prob": 0.1},
    "train_batch_size": 8,
    "source_weights": {"wiki": 2},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "xyz"}, "its data is 'abc', this run's is 'xyz'"),
        ({"seed": 4}, "its seed is 3, this run's is 4"),
        ({"train_batch_size": 16}, "its train_batch_size is 8, this run's is 16"),
        (
            {"model": {"hidden_size": 4, "hidden_dropout_prob": 0.0}},
            "its model.hidden_dropout_prob is 0.1, this run's is 0.0",
        ),
        ({"model": {**IDENTITY["model"], "layers": 2}}, "its model.layers is None, this run's is 2"),
        ({"masking": {"mlm_probability": 0.4}}, "its masking.mlm_probability is None, this run's is 0.4"),
        ({"source_weights": None}, "its source_weights.wiki is 2, this run's is None"),
    ],
)
def test_a_run_that_differs_is_refused_with_the_difference(change, message):
    assert check_identity(RUN, IDENTITY, dict(IDENTITY)) == []
    with pytest.raises(UserError) as caught:
        check_identity(RUN, IDENTITY, {**IDENTITY, **change})
    assert message in str(caught.value)
    assert "another --output_dir to start again" in str(caught.value)


def test_named_differences_are_allowed_and_described():
    saved = {
        "data": "abc",
        "masking": {"unit": "token", "share": 0.1},
        "model": {"hidden_dropout_prob": 0.1},
        "seed": 3,
    }
    current = {
        "data": "xyz",
        "masking": {"unit": "span", "share": 0.2},
        "model": {"hidden_dropout_prob": 0.0},
        "seed": 4,
    }
    allowed = ["data", "masking", "model.hidden_dropout_prob", "seed"]
    assert check_identity(RUN, saved, current, allowed) == [
        "its data is 'abc', this run's is 'xyz'",
        "its masking.unit is 'token', this run's is 'span'",
        "its masking.share is 0.1, this run's is 0.2",
        "its model.hidden_dropout_prob is 0.1, this run's is 0.0",
        "its seed is 3, this run's is 4",
    ]
    with pytest.raises(UserError, match=r"masking\.share is 0\.1.*--allow_change masking\.share"):
        check_identity(RUN, saved, current, ["data", "masking.unit", allowed[2], "seed"])


def test_names_that_only_the_checkpoint_has_are_allowed_too():
    saved = {"masking": {"unit": "whole-word", "words": 2}, "source_weights": {"wiki": 2}}
    current = {"masking": {"unit": "token"}, "source_weights": None}
    allowed = ["masking.unit", "source_weights.wiki"]
    assert len(check_identity(RUN, saved, current, allowed)) == len(check_identity(RUN, current, saved, allowed)) == 3
    assert (
        check_identity(RUN, current, current, ["masking.words", "source_weights.wiki"]) == []
    )  # the same command again
    with pytest.raises(UserError, match=r"its masking\.words is 2.*--allow_change masking\.words"):
        check_identity(RUN, saved, {**saved, "masking": {"unit": "whole-word", "words": 3}})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sed", "unknown name in --allow_change 'sed'; did you mean 'seed'"),
        ("masking.units", "did you mean 'masking.unit'"),
        ("model", "weights have that architecture"),
        ("model.hidden_size", "weights have that architecture"),
        ("train_batch_size", "counting batches"),
    ],
)
def test_a_change_that_is_unknown_or_cannot_be_is_refused_even_where_nothing_differs(name, words):
    identity = {"seed": 3, "train_batch_size": 8, "masking": {"unit": "token"}}
    identity["model"] = {"hidden_size": 4, "hidden_dropout_prob": 0.1}
    with pytest.raises(UserError, match=words):
        check_identity(RUN, identity, identity, ["seed", name])


def test_another_architecture_is_refused_with_its_reason():
    with pytest.raises(UserError, match=r"model\.hidden_size is 4, this run's is 8.*weights have that architecture"):
        check_identity(RUN, {"model": {"hidden_size": 4}}, {"model": {"hidden_size": 8}})


def test_settings_that_an_earlier_version_did_not_have_were_at_their_defaults():
    sizes = {"vocab_size": 400, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    saved = {
        "seed": 3,
        "model": sizes,
        "masking": {"mlm_probability": 0.2, "words": 2},
        "packing": {"max_seq_length": 64, "version": 3},
    }
    completed = completed_identity(saved)
    assert completed["masking"] == {**asdict(MaskingConfig(0.2)), "words": 2}
    assert completed["packing"] == {**asdict(PackingConfig(64)), "version": 3}
    assert completed["model"]["intermediate_size"] == 128
    assert completed["seed"] == 3
    assert saved["masking"] == {"mlm_probability": 0.2, "words": 2}


def test_a_checkpoint_of_another_optimizer_is_refused_and_an_old_one_is_adams():
    sizes = {"vocab_size": 400, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    old = {"model": sizes, "packing": {"max_seq_length": 64}}
    adams, muons = completed_identity(old), completed_identity(old | {"optimizer": "Muon"})
    assert adams == completed_identity(old | {"optimizer": "Adam"})
    for saved, current in ((adams, muons), (muons, adams)):
        with pytest.raises(UserError, match=r"its optimizer is .*Adam.*--init_from can start another run"):
            check_identity(RUN, saved, current)
        with pytest.raises(UserError, match="--allow_change optimizer: it can never change in a run"):
            check_identity(RUN, saved, current, ["optimizer"])
