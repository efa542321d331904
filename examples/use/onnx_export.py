"""Export a transformers folder, with whatever head it has, to ONNX; compare it with torch before the file appears."""

import argparse
import logging
import warnings
from pathlib import Path

import onnxruntime
import torch
import transformers

TOLERANCE = 1e-4
"""Largest difference between ONNX Runtime's outputs and torch's, both in fp32, as a share of the largest output."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Export a folder to ONNX and compare it with torch.")
    parser.add_argument("--model", type=Path, required=True, help="an exported or fine-tuned folder")
    parser.add_argument("--output", type=Path, required=True, help="the .onnx file to write")
    return parser.parse_args()


def export(model: Path, output: Path) -> float:
    config = transformers.AutoConfig.from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    kind = config.architectures[0]
    # An encoder's pooler would be new, and its output noise.
    without_pooler = {"add_pooling_layer": False} if kind.endswith("Model") else {}
    network = getattr(transformers, kind).from_pretrained(model, **without_pooler).eval()
    example = dict(tokenizer(["A short text.", "And one that is longer."], padding=True, return_tensors="pt"))
    program = torch.onnx.export(
        network,
        kwargs=example,
        input_names=list(example),
        output_names=list(network(**example)),
        dynamic_shapes={name: {0: "batch", 1: "length"} for name in example},
        dynamo=True,
        verbose=False,
    )
    content = program.model_proto.SerializeToString()  # up to 2 GiB, more than `large` has
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    longest = min(tokenizer.model_max_length, config.max_position_embeddings - config.pad_token_id - 1)
    shapes = ((1, longest), (2, 1), (5, longest // 2))
    difference = max(largest_difference(network, session, config, *shape) for shape in shapes)
    if not difference <= TOLERANCE:
        raise SystemExit(f"ONNX Runtime's outputs differ from torch's by {difference:.1e}: nothing was written")
    output.write_bytes(content)
    for node in (*session.get_inputs(), *session.get_outputs()):
        print(f"{node.name:20} {node.type} {node.shape}")
    print(
        f"{output}: {len(content) / 2**20:,.1f} MiB; its outputs equal torch's within {difference:.1e} of the largest"
    )
    return difference


def largest_difference(
    network: transformers.PreTrainedModel,
    session: onnxruntime.InferenceSession,
    config: transformers.RobertaConfig,
    batch: int,
    length: int,
) -> float:
    """Compare all outputs on random ids; all sequences but the first are padded in their second half."""
    input_ids = torch.randint(config.vocab_size, (batch, length))
    input_ids[input_ids == config.pad_token_id] = config.bos_token_id
    input_ids[1:, (length + 1) // 2 :] = config.pad_token_id
    inputs = {"input_ids": input_ids, "attention_mask": (input_ids != config.pad_token_id).long()}
    with torch.no_grad():
        expected = network(**inputs).to_tuple()
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    pairs = zip(expected, map(torch.from_numpy, outputs), strict=True)
    return max(((ours - theirs).abs().max() / theirs.abs().max()).item() for theirs, ours in pairs)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it looks for torchvision's operators
    warnings.filterwarnings("ignore", message="# The axis name")  # for each input that has the same axes
    export(**vars(parse_arguments()))
