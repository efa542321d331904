import pytest

from ds_roberta.config import OBJECTIVES, model_config
from ds_roberta.model.objectives import make_model
from ds_roberta.training.weight_decay import without_bias_and_norm


@pytest.mark.parametrize(("objective", "is_paired"), [*((name, False) for name in OBJECTIVES), ("mlm", True)])
def test_biases_and_layer_norms_alone_are_not_decayed(objective, is_paired):
    model = make_model(model_config("tiny", 400, 16), objective, is_paired)
    decayed, left_out = without_bias_and_norm(model)
    assert "weight_decay" not in decayed
    assert left_out["weight_decay"] == 0.0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)] for parameter in left_out["params"]}
    assert found == {name for name in names.values() if name.endswith(".bias") or "norm" in name.lower()}
    assert len(decayed["params"]) + len(found) == len(names)
