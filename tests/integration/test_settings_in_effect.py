"""What the options of `launch/pretrain.py` become in a run: its sequences, masks, weights, optimizer and identity.

The parts themselves have their own tests; here it is seen that each gets what was asked for.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ds_roberta.config import PackingConfig
from ds_roberta.data.loader import held_out_sequences
from ds_roberta.data.manifest import TOKENIZER_FOLDER
from ds_roberta.data.masking import Masker, Substituter, training_masker
from ds_roberta.data.mixture import sample_order
from ds_roberta.data.packing import open_index
from ds_roberta.data.words import word_flags
from ds_roberta.training.device import init_distributed
from ds_roberta.training.facts import check_identity, run_identity
from ds_roberta.training.micro_batch import batch_plans
from ds_roberta.training.run import _make_engine, _make_model, _make_trainer, _read_settings
from ds_roberta.training.run_data import make_loaders, open_data
from ds_roberta.training.settings import pretrain_options
from ds_roberta.training.start import find_start

REPOSITORY = Path(__file__).parents[2]
LENGTH, STEPS = 32, 40


@pytest.fixture(scope="module")
def make_run(tmp_path_factory, sourced):
    """A function that reads a run's options as the command does; the data have three sources."""
    folder = tmp_path_factory.mktemp("settings")
    shutil.copytree(sourced.folder, folder / "data")
    sourced.manifest.write(folder / "data")
    address = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in address.items():
            patch.setenv(name, value)
        patch.setenv("OMP_NUM_THREADS", "1")
        ranks = init_distributed()

        def make(config=None, **options):
            """A run of these options, with `config` for changes of the JSON."""
            content = json.loads((REPOSITORY / "ds_configs/zero2.json").read_text())
            path = folder / f"{len(list(folder.iterdir()))}.json"
            path.write_text(json.dumps({**content, "train_micro_batch_size_per_gpu": 4, **(config or {})}))
            usual = {
                "data_dir": folder / "data", "output_dir": folder / f"run-{path.stem}", "model": "nano",
                "max_seq_length": LENGTH, "max_steps": STEPS, "warmup_steps": "2", "train_batch_size": 8,
            }  # fmt: skip
            given = {**usual, **options}
            return _read_settings(pretrain_options(None if given.get("recipe") else path, **given), ranks)

        yield make
        dist.destroy_process_group()


def loaders_of(run, kind=Masker):
    data = open_data(run)
    plans = batch_plans(run.config.stages, {stage.max_seq_length: 4 for stage in run.config.stages}, 1)
    return data, *make_loaders(run, data, plans, kind, on_gpu=False)


def content(micro_batches):
    return [(each.input_ids.numpy().tobytes(), each.labels.numpy().tobytes()) for each in micro_batches]


def trained_on(run, steps):
    """The inputs and labels of these steps, as bytes."""
    _, loader, _ = loaders_of(run)
    return [content(loader.micro_batches(step)) for step in steps]


@pytest.mark.parametrize("seed", [0, 5])
def test_the_seed_decides_order_and_masks_and_not_what_is_held_out(make_run, seed):
    run = make_run(seed=seed)
    data, loader, held_out = loaders_of(run)
    packed, collator = data.train[LENGTH], loader.stage(0).collator
    places = np.arange(200)
    expected = sample_order(packed, None, seed).sequences(places)
    assert np.array_equal(loader.stage(0).order.sequences(places), expected)
    assert collator.masker.key == training_masker(run.config.masking, run.corpus.manifest.tokenizer, seed).key
    other = loaders_of(make_run(seed=seed + 1))[2]
    assert held_out.collator.masker.key == other.collator.masker.key


def test_sources_are_trained_on_by_their_weights(make_run):
    data, loader, _ = loaders_of(make_run(source_weights="wiki=1,books=2,web=1"))
    packed, names = data.train[LENGTH], ["books", "web", "wiki"]
    counts = dict.fromkeys(names, 0)
    ranges = packed.source_ranges()
    for sequence in loader.stage(0).order.sequences(np.arange(400)).tolist():
        (name,) = (name for name in names if any(first <= sequence < end for first, end in ranges[name]))
        counts[name] += 1
    assert counts == {"books": 200, "web": 100, "wiki": 100}


def test_masks_are_of_the_share_the_kind_and_the_number_of_copies_that_were_asked_for(make_run):
    run = make_run(mlm_probability=0.4, mlm_probability_end=0.2, mask_replace_prob=0.7, random_replace_prob=0.2)
    _, loader, held_out = loaders_of(run)
    assert [loader.mlm_probability(0), loader.mlm_probability(STEPS - 1)] == pytest.approx([0.4, 0.2])
    for step, share in ((0, 0.4), (STEPS - 1, 0.2)):
        labels = sum(len(each.labels) for each in loader.micro_batches(step))
        tokens = sum(int((each.input_ids > 2).sum()) for each in loader.micro_batches(step))
        assert labels / tokens == pytest.approx(share, abs=0.03)
    for collator in (loader.stage(0).collator, held_out.collator):
        assert (collator.masker.config.mask_replace_prob, collator.masker.config.random_replace_prob) == (0.7, 0.2)
    run = make_run(masking="whole-word")
    table = word_flags(run.corpus.folder / TOKENIZER_FOLDER, run.corpus.manifest.tokenizer.vocab_size)
    _, loader, held_out = loaders_of(run)
    for masker in (loader.stage(0).collator.masker, held_out.collator.masker):
        assert masker.config.unit == "whole-word"
        assert np.array_equal(masker._word_flags, table)
    assert isinstance(loaders_of(make_run(objective="rts"), Substituter)[1].stage(0).collator.masker, Substituter)
    assert loaders_of(make_run(masking_copies=3))[1].masking_copies == 3


@pytest.mark.parametrize("packing", ["doc-sentences", "contiguous", "segment-pair"])
def test_sequences_are_packed_as_asked_for_in_training_and_evaluation(make_run, packing):
    run = make_run(packing=packing, eval_sequences=8)
    data, loader, held_out = loaders_of(run)
    for split, found in (("train", loader.stage(0).collator.packed), ("validation", held_out.collator.packed)):
        expected = open_index(run.corpus, split, PackingConfig(LENGTH, packing))
        assert len(found) == len(expected) != len(open_index(run.corpus, split, PackingConfig(LENGTH)))
    assert np.array_equal(np.concatenate(held_out._parts), held_out_sequences(len(data.held_out), 8))


def test_lengths_and_batches_follow_their_schedules(make_run):
    schedules = {"max_seq_length_schedule": "0:16,50%:32", "train_batch_size_schedule": "0:4,10:8"}
    _, loader, _ = loaders_of(make_run(**schedules))
    shapes = [(loader.stage(step).collator.max_seq_length, loader.stage(step).stage.train_batch_size) for step in
              (0, 10, STEPS // 2)]  # fmt: skip
    assert shapes == [(16, 4), (16, 8), (32, 8)]


def test_documents_can_be_kept_apart(make_run):
    for attention, apart in (("within-sequences", False), ("within-documents", True)):
        _, loader, held_out = loaders_of(make_run(packing="contiguous", attention=attention))
        assert [each.within_documents for each in (loader.stage(0).collator, held_out.collator)] == [apart, apart]
        assert not loader.stage(0).collator.padded


CHANGES = {
    "seed": {"seed": 1},
    "source_weights": {"source_weights": "wiki=1,books=2,web=1"},
    "packing.format": {"packing": "contiguous"},
    "packing.max_seq_length": {"max_seq_length": 16},
    "masking.mlm_probability": {"mlm_probability": 0.2},
    "masking.mlm_probability_end": {"mlm_probability_end": 0.2},
    "masking.eval_mlm_probability": {"eval_mlm_probability": 0.2},
    "masking.unit": {"masking": "span"},
    "masking.copies": {"masking_copies": 2},
    "masking.mask_replace_prob": {"mask_replace_prob": 0.9},
    "train_batch_size": {"train_batch_size": 16},
    "train_batch_size_schedule": {"train_batch_size_schedule": "0:4,10:8"},
    "max_seq_length_schedule": {"max_seq_length_schedule": "0:16,10:32"},
    "lr_scheduler_type": {"lr_scheduler_type": "cosine"},
    "lr_power": {"lr_scheduler_type": "polynomial", "lr_power": 2.0},
    "decay_type": {"lr_scheduler_type": "warmup_stable_decay", "decay_type": "linear"},
    "min_lr_ratio": {"lr_scheduler_type": "cosine", "min_lr_ratio": 0.1},
    "attention": {"packing": "contiguous", "attention": "within-documents"},
    "initial_attention": {"initial_attention": "neighbours"},
    "initial_bias": {"initial_bias": "frequencies"},
    "no_decay_bias_and_norm": {"no_decay_bias_and_norm": True},
    "objective": {"objective": "rts"},
    "next_sentence_prediction": {"packing": "segment-pair"},
    "model.hidden_dropout_prob": {"hidden_dropout_prob": 0.0},
    "model.num_hidden_layers": {"model": "tiny"},
    "optimizer": {"recipe": "fast"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_does_not_go_on_from_a_checkpoint_of_other_settings(make_run, name):
    before, now = run_identity(make_run()), run_identity(make_run(**CHANGES[name]))
    assert check_identity(Path("run"), before, dict(before)) == []
    leaves = {f"{group}.{key}" if isinstance(value, dict) else group for group, value in now.items()
              for key in (value if isinstance(value, dict) else (None,))}  # fmt: skip
    assert name in leaves or name in now
    *group, key = name.split(".")
    assert (before.get(group[0], {}) if group else before).get(key) != (now[group[0]] if group else now).get(key)


def test_a_run_does_not_go_on_with_other_data_another_tokenizer_or_another_start(make_run, roberta_folder, tmp_path):
    run = make_run()
    before = run_identity(run)
    manifest = run.corpus.manifest
    tokenizer = replace(manifest.tokenizer, fingerprint="another")
    for name, changed in (
        ("data", replace(manifest, splits={"train": manifest.splits["train"][:2]})),
        ("tokenizer", replace(manifest, tokenizer=tokenizer)),
    ):
        now = run_identity(replace(run, corpus=type(run.corpus)(run.corpus.folder, changed)))
        assert now[name] != before[name]
    started = make_run(model=None, init_from=roberta_folder, output_dir=tmp_path / "run")
    assert before["init_from"] is None
    assert run_identity(started)["init_from"] == started.initial_model.fingerprint


def weights_of(run):
    engine, _, _ = _make_engine(run, find_start(run))
    return engine, {name: each.detach().clone() for name, each in engine.module.named_parameters()}


def test_initial_weights_follow_the_seed(make_run):
    name = "roberta.encoder.layer.0.attention.self.query.weight"
    first, again, other = (weights_of(make_run(seed=seed))[1][name] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_of_the_weights_decays_is_as_asked_for(make_run):
    config = json.loads((REPOSITORY / "ds_configs/zero2.json").read_text())
    decay = config["optimizer"]["params"]["weight_decay"]
    for exempt, expected in ((False, {decay}), (True, {decay, 0.0})):
        engine, _ = weights_of(make_run(no_decay_bias_and_norm=exempt))
        assert {group["weight_decay"] for group in engine.optimizer.param_groups} == expected


def test_the_fast_recipe_trains_by_its_rates_and_clips(make_run):
    run = make_run(recipe="fast", train_batch_size=4)
    assert run.deepspeed.resolved(run.precision, False)["gradient_clipping"] == 1.0
    start = find_start(run)
    run.config.output_dir.mkdir()
    data = open_data(run)
    engine, sizes, peak = _make_engine(run, start)
    assert engine.deepspeed.gradient_clipping() == 1.0
    trainer = _make_trainer(run, start, data, engine, batch_plans(run.config.stages, sizes, 1), peak, None)
    before = {name: each.detach().clone() for name, each in engine.module.named_parameters()}
    row = trainer.train_step(trainer.loader.micro_batches(0), 0.0)
    assert (row["learning_rate"], row["muon_lr"]) == pytest.approx((1e-3, 5e-3))  # half way through the warm-up
    moved = {name: not torch.equal(each, before[name]) for name, each in engine.module.named_parameters()}
    assert not moved.pop("roberta.embeddings.position_embeddings.weight")
    assert all(moved.values())


def test_layers_are_recomputed_as_the_json_says(make_run):
    run = make_run({"activation_checkpointing": {"number_checkpoints": 1}})
    assert _make_model(run).roberta.encoder.recomputed_layers == 1


def test_dropout_differs_between_steps_micro_steps_seeds_and_processes(make_run):
    run = make_run()
    micro_batch = loaders_of(run)[1].micro_batches(0)[0]
    engines = [weights_of(make_run(seed=seed))[0] for seed in (0, 1)]
    with torch.no_grad():
        for mine, others in zip(*(engine.module.parameters() for engine in engines), strict=True):
            others.copy_(mine)

    def loss(engine, global_step=0, micro_step=0, rank=0):
        ranks, engine.ranks = engine.ranks, replace(engine.ranks, rank=rank)
        with engine.accumulation():
            found = engine.forward_backward(micro_batch, micro_batch.counts, global_step, micro_step, True)
        engine.ranks = ranks
        return float(found["loss"])

    first = loss(engines[0])
    assert loss(engines[0]) == first
    others = [
        loss(engines[0], global_step=1),
        loss(engines[0], micro_step=1),
        loss(engines[0], rank=1),
        loss(engines[1]),
    ]
    assert len({first, *others}) == 5
