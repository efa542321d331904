"""The model card of a fine-tuned folder: its task, how it was trained, and how good it is, from its `results.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_roberta.config import MODEL_TYPES
from ds_roberta.finetuning.error_analysis import ERROR_ANALYSIS

PIPELINES = {
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
}
"""Hugging Face's names of tasks by the ends of transformers' names of classes."""
_SHOWN_LABELS = 100


def model_card(model_type: str, architecture: str, results: Mapping[str, Any], has_error_analysis: bool) -> str:
    """The text of `README.md` in the form of Hugging Face's model cards.

    Args:
        model_type: of the model's config, such as `roberta`.
        architecture: RoBERTa's class with the task's head, such as `RobertaForTokenClassification`.
        results: the content of `results.json`.
        has_error_analysis: whether the folder has `error_analysis.json`.
    """
    head = architecture.removeprefix(f"{MODEL_TYPES['roberta']}For")
    best, names, length = results["best"], results.get("label_names"), results["max_seq_length"]
    scores = {split: metrics for split, metrics in best.items() if isinstance(metrics, dict)}
    facts = {
        "started from": Path(results["model"]).name,
        "examples": ", ".join(f"{count:,} {split}" for split, count in results["examples"].items()),
        "learning rate": f"{best['learning_rate']:g}",
        "examples per step": best["train_batch_size"],
        "seed": f"{best['seed']}, the best of {len(results['settings'][0]['runs'])}",
        "epoch": best["epoch"],
        **{
            f"{name}, {split}": f"{value:.4f}"
            for split, metrics in scores.items()
            for name, value in metrics.items()
            if isinstance(value, float)
        },
        **results["versions"],
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    shown = ", ".join(f"`{name}`" for name in (names or ())[:_SHOWN_LABELS])
    more = f" and {len(names) - _SHOWN_LABELS} more" if names and len(names) > _SHOWN_LABELS else ""
    labels = f" Its labels: {shown}{more}." if names else ""
    private = (
        f"\n`{ERROR_ANALYSIS}` quotes texts of the validation examples: remove it where they may not be shown.\n"
        if has_error_analysis
        else ""
    )
    pipeline = f"pipeline_tag: {PIPELINES[head]}\n" if head in PIPELINES else ""  # a task may have another head
    return f"""---
library_name: transformers
{pipeline}tags:
- {model_type}
---

# Fine-tuned for {results["task"]}

A RoBERTa encoder fine-tuned with ds_roberta, on sequences of at most {length} tokens. The best epoch was chosen by \
{results["metric"]} on the validation examples.{labels}

```python
from transformers import AutoModelFor{head}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = AutoModelFor{head}.from_pretrained("THIS_FOLDER")
```

It knows no more than the text it was trained on, and repeats its errors and prejudices.
{private}
| of the training | |
|---|---|
{rows}
"""
