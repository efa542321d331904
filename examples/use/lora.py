"""Fine-tune an exported folder with LoRA by peft: which file is a sentence from?

Only the adapter and the head are trained. The adapter is saved, opened again on top of the exported folder, and merged
into its weights; both must predict what the trained model predicts.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

CORPUS = Path(__file__).resolve().parents[1] / "corpus"
WORKS = [CORPUS / name for name in ("treasure-island.txt", "cranford.txt")]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune an exported folder with LoRA by peft.")
    parser.add_argument("--model", type=Path, required=True, help="an exported folder")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write: adapter/ and merged/")
    parser.add_argument("--text", type=Path, nargs="+", default=WORKS, help="a file per label, a sentence a line")
    parser.add_argument("--max_steps", type=int, default=200, help="steps of 32 sentences (default: 200)")
    parser.add_argument("--learning_rate", type=float, default=5e-3, help="default: 5e-3, for nano; 5e-4 for base")
    return parser.parse_args()


def train(model: Path, output: Path, text: list[Path], max_steps: int, learning_rate: float) -> dict[str, float]:
    names = [path.stem for path in text]
    lines = [(line, label) for label, path in enumerate(text) for line in path.read_text("utf-8").splitlines()]
    rows = [(line, label) for line, label in lines if len(line.split()) > 4]
    held_out = rows[::10]
    targets = torch.tensor([label for _, label in held_out])
    tokenizer = AutoTokenizer.from_pretrained(model)

    def logits(classifier: torch.nn.Module) -> torch.Tensor:
        texts = [line for line, _ in held_out]
        inputs = tokenizer(texts, truncation=True, padding=True, return_tensors="pt").to(classifier.device)
        with torch.no_grad():
            return classifier.eval()(**inputs).logits.cpu()

    set_seed(0)  # the adapter and the head begin with random weights; the adapter's folder will hold both
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    exported, again = (AutoModelForSequenceClassification.from_pretrained(model, **labels) for _ in range(2))
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["query", "value"])
    trained = get_peft_model(exported, lora)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=max_steps,
        per_device_train_batch_size=32,
        learning_rate=learning_rate,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    encoded = [{**tokenizer(line, truncation=True), "labels": label} for line, label in rows]
    features = [row for number, row in enumerate(encoded) if number % 10]
    Trainer(trained, arguments, train_dataset=features, processing_class=tokenizer).train()
    expected = logits(trained)
    trained.save_pretrained(str(output / "adapter"))

    opened = PeftModel.from_pretrained(again.to(trained.device), str(output / "adapter"))
    of_opened = logits(opened)
    opened.merge_and_unload().save_pretrained(output / "merged")
    tokenizer.save_pretrained(output / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(output / "merged").to(trained.device)

    parameters, all_parameters = trained.get_nb_trainable_parameters()
    figures = {
        "trained parameters": parameters,
        "share of all parameters": parameters / all_parameters,
        "accuracy": (expected.argmax(1) == targets).float().mean().item(),
        "share of the most frequent label": targets.bincount().max().item() / len(targets),
        "difference of the opened adapter": (of_opened - expected).abs().max().item(),
        "difference of the merged model": (logits(merged) - expected).abs().max().item(),
    }
    for name, figure in figures.items():
        print(f"{name:34} {figure:,.3g}" if figure < 1 else f"{name:34} {figure:,}")
    return figures


if __name__ == "__main__":
    logging.set_verbosity_error()
    train(**vars(parse_arguments()))
