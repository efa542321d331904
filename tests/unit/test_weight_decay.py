import pytest

from ds_roberta.config import model_config
from ds_roberta.model.objectives import OBJECTIVES
from ds_roberta.training.optimizer import parameter_groups


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_biases_and_layer_norms_alone_are_not_decayed(objective):
    model = objective(model_config("tiny", 400, 16))
    decayed, left_out = parameter_groups(model, no_decay_bias_and_norm=True)
    assert "weight_decay" not in decayed
    assert left_out["weight_decay"] == 0.0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)] for parameter in left_out["params"]}
    assert found == {name for name in names.values() if name.endswith(".bias") or "norm" in name.lower()}
    assert len(decayed["params"]) + len(found) == len(names)
