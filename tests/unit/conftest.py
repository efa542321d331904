"""Fixtures of several unit tests."""

import copy
import json
from pathlib import Path

import pytest

from ds_roberta.deepspeed_config import DeepSpeedConfig

BASE = json.loads((Path(__file__).parents[2] / "ds_configs/zero2.json").read_text())


@pytest.fixture
def read_config(tmp_path):
    """A function that reads zero2.json with changes, given as {"section.key": value}; None removes a key."""

    def read_changed(changes, **overrides):
        content = copy.deepcopy(BASE)
        for name, value in changes.items():
            *sections, key = name.split(".")
            place = content
            for section in sections:
                place = place.setdefault(section, {})
            if value is None:
                del place[key]
            else:
                place[key] = value
        path = tmp_path / "config.json"
        path.write_text(json.dumps(content))
        return DeepSpeedConfig.read(path, **overrides)

    return read_changed
