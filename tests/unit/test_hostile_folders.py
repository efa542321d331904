"""Folders from elsewhere: nothing in them runs, nothing outside of them is read, and their sizes are not believed."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from shared_fixtures import change_json

from ds_roberta.data.shards import Corpus
from ds_roberta.errors import UserError
from ds_roberta.evaluation.roberta_folder import open_roberta
from ds_roberta.finetuning.predict import open_finetuned
from ds_roberta.inputs.paths import find_inputs
from ds_roberta.inputs.tables import read_table
from ds_roberta.training import deepspeed_checkpoint
from ds_roberta.training.initial_model import InitialModel
from ds_roberta.transformers_folder import check_tokenizer, open_folder, open_tokenizer, read_model

MODULE = "hostile_module"
AUTO_MAP = {
    "AutoConfig": f"{MODULE}.Config",
    "AutoModel": f"{MODULE}.Model",
    "AutoModelForMaskedLM": f"{MODULE}.Model",
    "AutoModelForSequenceClassification": f"{MODULE}.Model",
    "AutoTokenizer": [f"{MODULE}.Tokenizer", f"{MODULE}.Tokenizer"],
}


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that appears as soon as some code of a folder runs."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "marker"


class Code:
    """Leaves the marker when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mknod, (str(self.marker),)


@pytest.fixture
def folder(roberta_folder, tmp_path, marker):
    """A model with a head for texts, and with a file of code beside it that its configs name."""
    folder = tmp_path / "model"
    config = transformers.RobertaConfig.from_pretrained(roberta_folder)
    transformers.RobertaForSequenceClassification(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors") | load_file(roberta_folder / "model.safetensors")
    torch.save(weights, folder / "whole.bin")
    for path in roberta_folder.glob("tokenizer*"):
        shutil.copy(path, folder)
    for module in (MODULE, "modeling_roberta", "__init__"):
        (folder / f"{module}.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\n")
    return folder


def masked(folder):
    """Give the folder the weights of both heads, and the class of a masked-LM model."""
    (folder / "model.safetensors").unlink()
    (folder / "whole.bin").rename(folder / "pytorch_model.bin")
    change_json(folder / "config.json", architectures=["RobertaForMaskedLM"])


def open_in_all_ways(folder):
    """Open it as each command does: evaluation, fine-tuning, the start of a run; then as `predict` does."""
    read_model(folder, transformers.RobertaForSequenceClassification, changes={"num_labels": 2})
    open_tokenizer(folder)
    assert InitialModel.open(folder).fingerprint
    if (folder / "pytorch_model.bin").exists():
        open_roberta(folder)
        InitialModel.open(folder)._weights()
    else:
        open_finetuned(folder, None)


@pytest.mark.parametrize("is_masked", [False, True])
def test_code_that_configs_name_never_runs(folder, marker, is_masked):
    if is_masked:
        masked(folder)
    change_json(
        folder / "config.json", auto_map=AUTO_MAP, trust_remote_code=True, custom_pipelines={"x": {"impl": MODULE}}
    )
    change_json(
        folder / "tokenizer_config.json", auto_map=AUTO_MAP, trust_remote_code=True, tokenizer_class="Tokenizer"
    )
    open_folder(folder)
    open_in_all_ways(folder)
    with pytest.raises(UserError, match="its class is TokenizersBackend"):
        check_tokenizer(folder, folder)
    assert not marker.exists()
    assert not any(name.endswith(MODULE) for name in sys.modules)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_no_kernel_that_a_config_names_is_fetched(folder, monkeypatch, key):
    def fetch(*arguments, **options):
        raise AssertionError("a kernel is fetched")

    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetch)
    change_json(folder / "config.json", **{key: "somebody/kernel"})
    open_in_all_ways(folder)


def test_a_config_replaces_no_method_and_no_other_file(folder):
    (folder / "other.json").write_text(json.dumps({"vocab_size": 1 << 40}))
    change_json(folder / "config.json", to_dict=1, from_dict=1, __class__=1, configuration_files=["other.json"])
    open_in_all_ways(folder)
    change_json(folder / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(UserError, match=r"has transformers_weights 'other.safetensors': only None is supported"):
        open_folder(folder)


def test_a_snapshot_in_the_hubs_cache_is_opened(folder, tmp_path):
    """Its files are links to `blobs`, whose names have no suffix; the snapshot may itself be linked."""
    snapshot, blobs = tmp_path / "models--a--b/snapshots/1234", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    open_in_all_ways(snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    open_in_all_ways(tmp_path / "link")


def test_an_adapter_never_leads_to_another_model(folder, marker):
    content = {"peft_type": "LORA", "base_model_name_or_path": "/elsewhere", "auto_mapping": AUTO_MAP}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    torch.save({"code": Code(marker)}, folder / "adapter_model.bin")
    for read in (open_folder, open_in_all_ways, InitialModel.open):
        with pytest.raises(UserError, match=r"has an adapter \(adapter_config.json\): merge it"):
            read(folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "training_args.bin", "adapter_model.bin"])
def test_a_pickle_never_runs(folder, marker, name):
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1), "code": Code(marker)}, folder.parent / "elsewhere.bin")
    (folder / name).symlink_to("../elsewhere.bin")
    if name == "pytorch_model.bin":
        for read in (
            open_roberta,
            lambda path: open_finetuned(path, None),
            lambda path: InitialModel.open(path)._weights(),
        ):
            with pytest.raises(UserError, match="hold more than tensors, which could run code"):
                read(folder)
    else:
        open_finetuned(folder, None)
    assert not marker.exists()


def test_an_index_never_names_a_pickle_elsewhere(folder, marker):
    (folder / "model.safetensors").unlink()
    torch.save({"code": Code(marker)}, folder.parent / "elsewhere.bin")
    for name in ("../elsewhere.bin", str(folder.parent / "elsewhere.bin")):
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="which is missing there"):
            open_folder(folder)
    assert not marker.exists()


def test_the_state_of_deepspeeds_layout_is_read_without_running_code(tmp_path, marker):
    torch.save({"code": Code(marker)}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="cannot read DeepSpeed's checkpoint file"):
        deepspeed_checkpoint.read_state(tmp_path, 1, 1, "fp32")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1 << 64}, "lack 'encoder.layer.18446744073709551615"),
        ({"vocab_size": 1 << 40}, "lack 'embeddings.word_embeddings.weight' or have it in another shape"),
        ({"max_position_embeddings": 1 << 40}, "lack 'embeddings.position_embeddings.weight' or have it in another"),
        ({"hidden_size": 1 << 40}, "lack 'embeddings.word_embeddings.weight' or have it in another shape"),
        ({"intermediate_size": 1 << 40}, "lack 'encoder.layer.0.intermediate.dense.weight' or have it in another"),
        ({"num_labels": 1 << 40, "id2label": None, "label2id": None}, "has num_labels 1099511627776"),
        ({"num_labels": "2"}, "has num_labels '2'"),
        ({"id2label": {"0": "a", "7": "b"}}, "number the labels from 0"),
        ({"id2label": {"0": [], "1": "b"}}, "number the labels from 0"),
        ({"architectures": 3}, "has the architectures 3"),
        ({"model_type": ["roberta"]}, "has the type"),
    ],
)
def test_the_values_of_a_config_are_not_believed(folder, changes, message):
    change_json(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        open_finetuned(folder, None)


# Data


@pytest.fixture
def data(tmp_path, write_corpus):
    import numpy as np

    write_corpus(tmp_path / "data", {"train": [[[np.arange(4, 30)]]]})
    return tmp_path / "data"


def test_data_never_names_code(data, marker):
    code = f"open({str(marker)!r}, 'w')"
    (data / "data.py").write_text(code)
    change_json(data / "tokenizer/tokenizer_config.json", auto_map=AUTO_MAP, trust_remote_code=True)
    (data / f"tokenizer/{MODULE}.py").write_text(code)
    assert len(Corpus.open(data).split("train").values(0))
    for path in (data / "train/state.json", data / "train/dataset_info.json"):
        change_json(path, builder_name="data.py", _format_type="custom", trust_remote_code=True)
    with pytest.raises(UserError, match="save it again"):
        read_table(data / "train")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../../secret.arrow", "{folder}/secret.arrow"])
def test_a_saved_data_set_names_no_file_elsewhere(tmp_path, data, name):
    shard = min((data / "train").glob("*.arrow"))
    shutil.copy(shard, tmp_path / "secret.arrow")
    name = name.format(folder=tmp_path)
    change_json(data / "train/state.json", _data_files=[{"filename": name}])
    for read in (lambda: find_inputs([str(data / "train")]), lambda: read_table(data / "train")):
        with pytest.raises(UserError, match="outside of the folder"):
            read()


def test_links_to_files_are_followed_and_their_names_kept(tmp_path, data):
    """The hub's cache has links out of its folders, so these are allowed: who links a file can read it."""
    shard = min((data / "train").glob("*.arrow"))
    blob = Path(shutil.move(shard, tmp_path / "blob"))
    shard.symlink_to(blob)
    (tmp_path / "link").symlink_to(data)
    for folder in (data, tmp_path / "link"):
        assert len(Corpus.open(folder).split("train").values(0))
        assert len(read_table(folder / "train").rows) == 1
        assert find_inputs([str(folder / "train")]).files == (str(folder / "train" / shard.name),)


def test_a_length_of_the_tokenizer_that_holds_no_text_is_refused(folder):
    change_json(folder / "tokenizer_config.json", model_max_length=2)
    with pytest.raises(UserError, match=r"model_max_length of the tokenizer in .* must be at least 8, got 2"):
        open_folder(folder).sequence_length(None, 8)
