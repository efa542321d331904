"""Train sentence embeddings from an exported folder with sentence-transformers, and search with them.

A pair is a sentence and the next one. The model learns to find a sentence's neighbour among those of its batch; whether
it has learned that is measured on documents that it was not trained on.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.util import semantic_search
from transformers.utils import logging

CORPUS = sorted((Path(__file__).resolve().parents[1] / "corpus").glob("*.txt"))
QUERY = "The ship left the harbour in the night."


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train sentence embeddings with sentence-transformers, and search.")
    parser.add_argument("--model", type=Path, required=True, help="an exported folder")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write, for SentenceTransformer(…)")
    parser.add_argument("--text", type=Path, nargs="+", default=CORPUS, help="files in the form of examples/corpus")
    parser.add_argument("--max_steps", type=int, default=200, help="steps of 64 pairs (default: 200)")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="default: 5e-4, for nano; 5e-5 for base")
    parser.add_argument("--query", default=QUERY, help=f"a sentence to search for (default: {QUERY!r})")
    return parser.parse_args()


def pairs_of(documents: list[str]) -> list[tuple[str, str]]:
    """Sentences in twos, each in one pair; those of few words, such as "Yes.", could follow any."""
    sentences = ([line for line in document.splitlines() if len(line.split()) > 4] for document in documents)
    return [pair for lines in sentences for pair in zip(lines[::2], lines[1::2], strict=False)]


def train(
    model: Path, output: Path, text: list[Path], max_steps: int, learning_rate: float, query: str
) -> dict[str, float]:
    documents = [document for path in text for document in path.read_text("utf-8").split("\n\n")]
    pairs = pairs_of([document for number, document in enumerate(documents) if number % 10])
    held_out = pairs_of(documents[::10])
    held_out = random.Random(0).sample(held_out, min(1000, len(held_out)))
    first, second = ({str(number): pair[side] for number, pair in enumerate(held_out)} for side in (0, 1))
    evaluate = InformationRetrievalEvaluator(first, second, {number: {number} for number in first}, accuracy_at_k=[10])

    transformer = Transformer(str(model))
    encoder = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), "mean")])
    before = evaluate(encoder)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(output),
        max_steps=max_steps,
        per_device_train_batch_size=64,
        learning_rate=learning_rate,
        warmup_steps=0.1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    columns = Dataset.from_dict({"anchor": [pair[0] for pair in pairs], "positive": [pair[1] for pair in pairs]})
    loss = MultipleNegativesRankingLoss(encoder)
    SentenceTransformerTrainer(encoder, arguments, columns, loss=loss).train()
    encoder.save_pretrained(str(output))
    complete_for_servers(output, encoder.max_seq_length)

    encoder = SentenceTransformer(str(output), local_files_only=True)
    name = "cosine_accuracy@10"
    shares = {"chance": 10 / len(held_out), "before": before[name], "after": evaluate(encoder)[name]}
    print(f"trained on {max_steps * 64:,} of {len(pairs):,} pairs; {len(held_out):,} of other documents are held out")
    print("neighbour among the ten nearest: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    sentences = list(second.values())
    print(f"nearest to {query!r}:")
    for hit in semantic_search(encoder.encode(query), encoder.encode(sentences), top_k=3)[0]:
        print(f"  {hit['score']:.2f}  {sentences[hit['corpus_id']]}")
    return shares


def complete_for_servers(folder: Path, max_seq_length: int) -> None:
    """Add what servers read and sentence-transformers no longer writes; first, since older servers take the first."""
    for name, fields in {
        "sentence_bert_config.json": {"max_seq_length": max_seq_length, "do_lower_case": False},
        "1_Pooling/config.json": {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True},
    }.items():
        content = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps({**fields, **content}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    logging.set_verbosity_error()
    train(**vars(parse_arguments()))
