"""Compute what a step would cost on GPUs that are not available: memory, communication and time.

Parameters and saved activations are counted on the real model, on torch's meta device; state bytes follow
`engine_bytes`, which a test compares with a real engine; batches come from `BatchPlan`. Figures of GPUs and networks
come from data sheets; the constants below and `Case` hold the assumptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest import mock

import torch

from benchmarks.throughput_case import VOCABULARY
from ds_roberta.config import PRESETS, SPECIAL_TOKENS_PER_SEQUENCE, MaskingConfig, ModelConfig, model_config
from ds_roberta.model.architecture import config_path, read_architecture
from ds_roberta.model.kernels import Dropout
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.training.checkpoint_writer import owners
from ds_roberta.training.micro_batch import MEMORY_SHARE, BatchPlan, full_micro_batch
from ds_roberta.training.peak import data_sheet_rate

CONTEXT_BYTES = 2_000_000_000
"""Assumed: the CUDA context and NCCL's buffers of a process."""
LINK_SHARE = 0.7
"""Assumed: the share of a link's data-sheet rate that a large collective reaches."""
FULL_TOKENS = 16_384
"""Assumed: tokens that a micro-batch needs for a GPU to reach the utilisation."""
COMMUNICATION_SHARE = 0.2
"""Share of the step above which communication counts as the limit."""
PERSISTENT_ELEMENTS = 100_000
"""DeepSpeed's default stage3_param_persistence_threshold: smaller parameters are whole on every process."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default reduce_bucket_size."""


@dataclass(frozen=True)
class Gpu:
    """A GPU's figures from NVIDIA's data sheets.

    Attributes:
        name: the name that torch gives the GPU, under which `training.peak` has its dense 16-bit rate.
        link: bytes/s in one direction from a GPU to the others of its node: NVLink, or PCIe without it.
        network: Gbit/s of the network for each GPU in NVIDIA's own systems.
    """

    name: str
    memory: float
    link: float
    network: float
    bf16: bool = True

    @property
    def flops(self) -> float:
        rate = data_sheet_rate(self.name)
        assert rate is not None
        return rate


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 80e9, 450e9, 400),  # H100 SXM data sheet; DGX H100 data sheet
    "h200": Gpu("NVIDIA H200", 141e9, 450e9, 400),  # H200 SXM data sheet; DGX H200 data sheet
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", 40e9, 300e9, 200),  # A100 SXM data sheet; DGX A100 data sheet
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", 80e9, 300e9, 200),
    "v100-32": Gpu("Tesla V100-SXM2-32GB", 32e9, 150e9, 50, bf16=False),  # V100 SXM2 data sheet; DGX-1 data sheet
    "l40s": Gpu("NVIDIA L40S", 48e9, 32e9, 100),  # L40S data sheet (PCIe 4.0 x16); the network is assumed
    "l4": Gpu("NVIDIA L4", 24e9, 32e9, 100),  # L4 data sheet (PCIe 4.0 x16); the network is assumed
}


@dataclass(frozen=True)
class Case:
    """A run to plan.

    Attributes:
        model: a preset, or the path of a RobertaConfig, whose vocabulary then replaces `vocab_size`.
        utilisation: the assumed share of the GPU's rate.
        interconnect: Gbit/s for each GPU; None for the GPU's own.
        number_checkpoints: layers whose activations are recomputed, as in the JSON's `activation_checkpointing`.
    """

    model: str = "base"
    gpus: int = 8
    gpu: str = "h100"
    gpus_per_node: int = 8
    zero_stage: int = 1
    precision: str = "bf16"
    max_seq_length: int = 512
    train_batch_size: int = 8_192
    max_steps: int = 500_000
    save_interval: int = 1_000
    utilisation: float = 0.5
    interconnect: float | None = None
    vocab_size: int = VOCABULARY
    number_checkpoints: int = 0

    @property
    def config(self) -> ModelConfig:
        if self.model in PRESETS:
            return model_config(self.model, self.vocab_size, self.max_seq_length)
        return read_architecture(config_path(self.model))


class _Flash(torch.autograd.Function):
    """What torch's flash attention saves for its backward pass: Q, K, V, the output and a sum per head and token.

    Memory is counted after the forward pass, so this function needs no backward pass.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        # The kernel writes heads next to each other, so that its output is not copied again.
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output


class _Recomputed(torch.autograd.Function):
    """What a recomputed layer saves for its backward pass: its input."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        return torch.empty_like(hidden)


@cache
def meta_model(config: ModelConfig) -> MaskedLM:
    """Return the real model in 16 bits on the meta device, where it takes no memory."""
    with torch.device("meta"):
        return MaskedLM(config).to(torch.bfloat16)


@cache
def saved_bytes(config: ModelConfig, length: int, sequences: int, number_checkpoints: int = 0) -> int:
    """Return the most bytes that autograd keeps for a micro-batch on a GPU.

    Without recomputation that is between the forward and the backward pass; with it, when the backward pass has
    computed the activations of one layer again. torch's dropout on a GPU keeps a mask of one byte per element; the mask
    of attention is drawn again by its kernel.
    """
    model = meta_model(config)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}
    masks = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage())._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    def count_mask(module: Dropout, values: torch.Tensor) -> torch.Tensor:
        nonlocal masks
        masks += values.numel() if module.p else 0
        return values

    model.roberta.encoder.recomputed_layers = number_checkpoints
    batch = full_micro_batch(sequences, length, MaskingConfig())
    tensors = {name: getattr(batch, name).to("meta") for name in ("input_ids", "masked_positions", "labels")}
    with (
        mock.patch("ds_roberta.model.encoder.attention", lambda query, key, value, *_: _Flash.apply(query, key, value)),
        mock.patch("ds_roberta.model.encoder.checkpoint", lambda layer, hidden, *_, **__: _Recomputed.apply(hidden)),
        mock.patch.object(Dropout, "forward", count_mask),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        model(replace(batch, **tensors, attention_mask=None))
    kept = masks + sum(storage.nbytes() for storage in storages.values())
    if not number_checkpoints:
        return kept
    fewer = replace(config, num_hidden_layers=config.num_hidden_layers - 1)
    return kept + saved_bytes(config, length, sequences) - saved_bytes(fewer, length, sequences)


def engine_bytes(
    parameters: int, persistent: int, zero_stage: int, precision: str, world_size: int
) -> dict[str, float]:
    """Return the bytes that the engine holds on a GPU while gradients are summed; at stage 3 a pass adds `gathered`.

    Args:
        parameters: number of the model's parameters.
        persistent: number of parameters in tensors of at most `PERSISTENT_ELEMENTS`, which stage 3 keeps whole.

    Weights have 16 bits. Autograd's fp32 gradient sum is whole on every process at every stage. At stage 1, DeepSpeed's
    bf16 optimizer has a second whole fp32 buffer for it; at stage 3, DeepSpeed has an fp32 buffer for this process's
    part. The fp32 master and Adam's two moments are divided.
    """
    spread = parameters - persistent
    divided = zero_stage == 3
    second = {1: 4 * parameters if precision == "bf16" else 0, 2: 0, 3: 4 * parameters / world_size}[zero_stage]
    return {
        "weights": 2 * (persistent + parameters / world_size) if divided else 2 * parameters,
        "gradients": 4 * parameters + second,
        "optimizer": 12 * parameters / world_size,
        "gathered": 2 * spread if divided else 0,
    }


@dataclass(frozen=True)
class Plan:
    """The computed figures of a case; bytes and seconds are those of one GPU."""

    case: Case
    parameters: int
    state: dict[str, float]
    activations_per_sequence: int
    largest_micro_batch: int
    batch: BatchPlan | None
    wire_bytes: float
    compute_seconds: float
    communication_seconds: float
    checkpoint_bytes: int
    checkpoint_files: int
    checkpoint_share: int

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.communication_seconds

    @property
    def hours(self) -> float:
        return self.case.max_steps * self.step_seconds / 3_600

    @property
    def tokens_per_second(self) -> float:
        return self.case.train_batch_size * self.case.max_seq_length / self.step_seconds

    @property
    def communication_share(self) -> float:
        return self.communication_seconds / self.step_seconds

    @property
    def verdict(self) -> str:
        """Say what limits the run, and which setting to change."""
        case = self.case
        for_memory = "stage 2 or 3" if case.zero_stage == 1 else "stage 3" if case.zero_stage == 2 else "fewer layers"
        if case.number_checkpoints < case.config.num_hidden_layers:
            for_memory = f"--number_checkpoints {case.config.num_hidden_layers}, or {for_memory}"
        if self.batch is None:
            return f"does not fit: {for_memory}, or a shorter sequence"
        limits = []
        if self.batch.micro_batch_size * case.max_seq_length < FULL_TOKENS:
            limits.append(f"micro-batch under {FULL_TOKENS:,} tokens")
        if self.communication_share > COMMUNICATION_SHARE:
            limits.append(f"{self.communication_share:.0%} communication")
        if self.batch.empty_places * 20 > case.train_batch_size:
            limits.append(f"{self.batch.empty_places:,} empty places")
        if not limits:
            return "scales"
        by_memory = self.batch.accumulation_steps > 1 and self.communication_share <= COMMUNICATION_SHARE
        remedy = for_memory if by_memory else "a larger batch, which the GPUs divide, or fewer GPUs"
        return f"{', '.join(limits)}: {remedy}"


def plan(case: Case) -> Plan:
    """Compute all figures of a case, by arithmetic and by counting on the meta device."""
    gpu, config, world = GPUS[case.gpu], case.config, case.gpus
    sizes = [parameter.numel() for parameter in meta_model(config).parameters()]
    total, persistent = sum(sizes), sum(size for size in sizes if size <= PERSISTENT_ELEMENTS)
    state = engine_bytes(total, persistent, case.zero_stage, case.precision, world)
    share = -(-case.train_batch_size // world)
    largest = largest_micro_batch(case, sum(state.values()), total, share)
    batch = BatchPlan.fit(case.train_batch_size, largest, world) if largest else None
    micro_steps = batch.accumulation_steps if batch else 0
    wire = wire_bytes(total, persistent, case.zero_stage, world, micro_steps)
    links = gpu.link
    if world > case.gpus_per_node:  # rings leave a node through all its network cards
        links = min(links, (case.interconnect or gpu.network) * 1e9 / 8 * case.gpus_per_node)
    rows = batch.micro_batch_size * micro_steps if batch else 0
    length = case.max_seq_length
    masked_share = MaskingConfig.mlm_probability * (length - SPECIAL_TOKENS_PER_SEQUENCE) / length
    # A third of the layers' operations are the forward pass, which recomputed ones take again.
    again = MaskedLM.flops_per_token(config, length, 0) / 3 * case.number_checkpoints / config.num_hidden_layers
    flops = rows * length * (MaskedLM.flops_per_token(config, length, masked_share) + again)
    shares = [0] * world
    for size, owner in zip(sizes, owners(sizes, world), strict=True):
        shares[owner] += 12 * size
    return Plan(
        case,
        total,
        state,
        saved_bytes(config, length, 2, case.number_checkpoints)
        - saved_bytes(config, length, 1, case.number_checkpoints),
        largest,
        batch,
        wire,
        flops / (gpu.flops * case.utilisation),
        wire / (links * LINK_SHARE),
        sum(shares),
        sum(map(bool, shares)),
        max(shares),
    )


def largest_micro_batch(case: Case, state: float, parameters: int, limit: int) -> int:
    """Return the largest micro-batch up to `limit` that fits, searched as in `training.micro_batch`; 0 if none does."""
    config, length = case.config, case.max_seq_length
    one = saved_bytes(config, length, 1, case.number_checkpoints)
    sequence = saved_bytes(config, length, 2, case.number_checkpoints) - one
    # Assumed: in addition to what is saved, a layer's gradients take at most 4 times the MLP's inner width plus 8 times
    # the hidden size in values per token, the head at most two fp32 blocks of 1,024 rows and its fp32 weights.
    passing = 2 * (4 * config.intermediate_size + 8 * config.hidden_size) * length
    head = 2 * 4 * 1024 * config.vocab_size + 6 * config.vocab_size * config.hidden_size
    capacity = MEMORY_SHARE * (GPUS[case.gpu].memory - CONTEXT_BYTES) - state
    # When the gradient is reduced, the activations are freed, and one bucket of the gradient is copied.
    if capacity < 4 * min(parameters, BUCKET_ELEMENTS):
        return 0
    return min(limit, max(0, math.floor((capacity - (one - sequence) - head) / (sequence + passing))))


def wire_bytes(parameters: int, persistent: int, zero_stage: int, world: int, micro_steps: int) -> float:
    """Return the bytes that a GPU sends in a step by ring collectives, as observed with DeepSpeed 0.19.8 in our engine.

    Stages 1 and 2 all-reduce the fp32 gradient (twice its size) and gather the 16-bit weights. Stage 3 reduce-scatters
    the gradient, gathers large tensors once per micro-step, for both passes, and small ones after each update.
    """
    hops = (world - 1) / world
    if zero_stage < 3:
        return hops * (2 * 4 + 2) * parameters
    return hops * (4 * parameters + 2 * (micro_steps * (parameters - persistent) + persistent))
