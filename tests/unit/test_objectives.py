"""An objective is one class, and the rest of the program needs to know nothing else about it."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ds_roberta.config import MaskingConfig, PackingConfig, ScheduleConfig, model_config
from ds_roberta.data.loader import Collator, HeldOutSample, LoaderStage, TrainLoader
from ds_roberta.data.masking import evaluation_masker, training_masker
from ds_roberta.data.order import SampleOrder
from ds_roberta.data.packing import build_index, open_index
from ds_roberta.data.stages import make_stages
from ds_roberta.errors import UserError
from ds_roberta.model import objectives
from ds_roberta.model.initialization import initialize_weights
from ds_roberta.model.objectives import OBJECTIVES, MaskedLM, Objective, find_objective, objective_of
from ds_roberta.training.checkpoint import TrainState
from ds_roberta.training.export import model_card
from ds_roberta.training.micro_batch import full_micro_batch
from ds_roberta.training.monitors import Monitors
from ds_roberta.training.settings import RunConfig
from ds_roberta.training.trainer import Trainer

LENGTH, STEPS, BATCH = 16, 6, 8


class EvenIds(Objective):
    """A made-up objective: is the true id of a masked token even? It has two losses, of tokens and of sequences."""

    name = "even"
    summary = "find even ids"
    description = "finding even ids, whose head is not in this folder"

    def __init__(self, config):
        super().__init__(config)
        self.even_head = nn.Linear(config.hidden_size, 1)
        initialize_weights(self, config.initializer_range)

    def forward(self, batch):
        hidden = self.hidden_ND(batch)
        logits = self.even_head(hidden[batch.masked_positions])[:, 0]
        even = batch.labels % 2 == 0
        return {
            "token_loss": F.binary_cross_entropy_with_logits(logits, even.float(), reduction="sum"),
            "size_loss": hidden[batch.first_tokens[: batch.sequences]].square().mean(-1).sum(),
            "correct": ((logits > 0) == even).sum().float(),
        }

    @staticmethod
    def weigh(sums, counts):
        return sums["token_loss"] + counts.labels / counts.sequences * sums["size_loss"]

    @staticmethod
    def metrics(sums, counts):
        token_loss, size_loss = sums["token_loss"] / counts.labels, sums["size_loss"] / counts.sequences
        return {"loss": token_loss + size_loss, "size_loss": size_loss, "accuracy": sums["correct"] / counts.labels}

    @staticmethod
    def report(evaluation):
        return {"even ids found": f"{evaluation['accuracy']:.0%}"}

    @staticmethod
    def head_parameters(config):
        return config.hidden_size


class TorchEngine:
    """Trains by plain torch."""

    def __init__(self, module, ranks):
        self.module, self.ranks, self.device = module, ranks, torch.device("cpu")
        self._optimizer = torch.optim.AdamW(module.parameters())

    def set_batch(self, plan):
        pass

    def accumulation(self):
        return contextlib.nullcontext()

    def forward_backward(self, micro_batch, counts, global_step, micro_step, last):
        sums = self.module(micro_batch)
        (self.module.weigh(sums, counts) / counts.labels).backward()
        return {name: value.detach() for name, value in sums.items()}

    def step(self, rate, loss, muon_lr):
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return SimpleNamespace(grad_norm=1.0, skipped=False, loss_scale=1.0)

    def evaluate(self, micro_batch):
        self.module.eval()
        with torch.no_grad():
            return {name: float(value) for name, value in self.module(micro_batch).items()}


@pytest.fixture
def even(monkeypatch):
    monkeypatch.setattr(objectives, "OBJECTIVES", (*OBJECTIVES, EvenIds))
    monkeypatch.setitem(objectives.SUMMARIES, EvenIds.name, EvenIds.summary)


def make_trainer(folder, corpus, ranks):
    config = RunConfig(
        data_dir=corpus.folder,
        output_dir=folder,
        model_name="tiny",
        model=model_config("tiny", 400, LENGTH),
        packing=PackingConfig(LENGTH),
        schedule=ScheduleConfig(STEPS, 0),
        stages=make_stages(LENGTH, BATCH, None, None),
        objective="even",
    )
    torch.manual_seed(0)
    model = find_objective(config.objective, config.packing)(config.model)
    tokenizer, parts = corpus.manifest.tokenizer, {}
    maskers = {
        "train": training_masker(config.masking, tokenizer, 0, kind=model.masker),
        "validation": evaluation_masker(config.masking, tokenizer, kind=model.masker),
    }
    for split, masker in maskers.items():
        build_index(corpus, split, config.packing)
        parts[split] = Collator(open_index(corpus, split, config.packing), masker, tokenizer, LENGTH)
    order = SampleOrder(len(parts["train"].packed), 0)
    loader = TrainLoader([LoaderStage(config.stages[0], parts["train"], order, BATCH // 2)])
    held_out = HeldOutSample(parts["validation"], 16, 4, ranks)
    state = TrainState({**model.identity(), "packing": {"max_seq_length": LENGTH}})
    engine, monitors = TorchEngine(model, ranks), Monitors(folder, {}, False)
    return Trainer(
        config, engine, loader, held_out, state, None, peak_learning_rate=1e-3, peak_flops=1e9, monitors=monitors
    )


def test_a_made_up_objective_trains_and_is_evaluated(tmp_path, corpus, solo_ranks, even, capsys, monkeypatch):
    trainer = make_trainer(tmp_path, corpus, solo_ranks)
    monkeypatch.setattr(trainer, "save", lambda: None)  # checkpoints hold an engine's moments
    assert trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert list(steps[0])[:4] == ["global_step", "loss", "size_loss", "accuracy"]
    assert [row["global_step"] for row in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["size_loss"] < steps[0]["size_loss"]
    evaluations = [row for row in rows if "eval_loss" in row]
    assert list(evaluations[-1]) == ["global_step", "eval_loss", "eval_size_loss", "eval_accuracy"]
    assert f"step {STEPS}: even ids found {evaluations[-1]['eval_accuracy']:.0%}" in capsys.readouterr().err
    weights = {name: value for name, value in trainer.engine.module.named_parameters() if name.startswith("roberta.")}
    card = model_card(trainer.config.model, trainer.state, weights, tmp_path / f"checkpoints/global_step{STEPS}")
    assert "| objective | finding even ids, whose head is not in this folder |" in card
    assert f"| even ids found | {evaluations[-1]['eval_accuracy']:.0%}, after step {STEPS} |" in card


@pytest.mark.parametrize("objective", [*OBJECTIVES, EvenIds])
def test_an_objective_is_found_again_from_the_identity_of_its_runs(objective, even):
    assert objective_of(objective.identity()) is objective
    packing = PackingConfig(LENGTH, "segment-pair" if objective.is_paired else "contiguous")
    assert find_objective(objective.name, packing) is objective


def test_identities_are_those_of_earlier_versions():
    identities = [{}, {"objective": "mlm-bow"}, {"next_sentence_prediction": True}, {"objective": "rts"}]
    assert [each.identity() for each in OBJECTIVES] == identities
    assert objective_of({"next_sentence_prediction": False}) is MaskedLM


@pytest.mark.parametrize(
    ("name", "packing", "message"),
    [
        ("even", "contiguous", r"--objective must be one of mlm, mlm-bow, rts, got 'even'"),
        ("mlm-bow", "segment-pair", r"--objective mlm-bow cannot be trained with --packing segment-pair: choose"),
        ("rts", "sentence-pair", r"--objective rts cannot be trained with --packing sentence-pair: choose another"),
    ],
)
def test_an_objective_that_there_is_not_is_an_error(name, packing, message):
    with pytest.raises(UserError, match=message):
        find_objective(name, PackingConfig(LENGTH, packing))


def test_a_checkpoint_of_an_unknown_objective_is_an_error():
    with pytest.raises(UserError, match="the checkpoint's objective 'even' is unknown"):
        objective_of({"objective": "even"})


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_metrics_are_those_of_the_loss_that_is_differentiated(objective):
    torch.manual_seed(0)
    model = objective(model_config("tiny", 400, LENGTH)).eval()
    batch = full_micro_batch(3, LENGTH, MaskingConfig(), model.masker)
    sums = model(batch)
    loss = model.metrics({name: value.item() for name, value in sums.items()}, batch.counts)["loss"]
    assert (model.weigh(sums, batch.counts) / batch.counts.labels).item() == pytest.approx(loss)
    assert all(not value.requires_grad for name, value in sums.items() if not name.endswith("loss"))
