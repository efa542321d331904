"""The common part of tasks whose inputs are texts or pairs of texts in tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers

from ds_roberta.errors import UserError
from ds_roberta.finetuning.labelled_tables import Columns, Text, TextColumns, find_texts, with_kept_columns
from ds_roberta.finetuning.labels import Labels
from ds_roberta.finetuning.task import COMMAND_LINE, RESULTS, Encoded, Task, one_line
from ds_roberta.inputs.tables import read_table
from ds_roberta.process import logger

KEY = "text_columns"
"""Of `results.json`."""


class TextTask(Task):
    """The common part of tasks that predict a label or a number for each text or pair."""

    architecture = "RobertaForSequenceClassification"
    takes_pairs = True
    options_class = Labels

    def __init__(self, options: Columns, text_columns: TextColumns | None = None):
        """
        Args:
            text_columns: of the training examples; None: they are unknown, and so is whether the model takes pairs.
        """
        self.options, self.text_columns = options, text_columns
        self.results = {} if text_columns is None else {KEY: list(text_columns)}

    def read_inputs(self, path: str) -> list[Text]:
        table = read_table(path)
        texts = find_texts(table, with_kept_columns(table, self.options, self.text_columns))
        self._check_pairs(texts[0], "name their columns by --text_column and --text_pair_column", "by --text_column")
        return texts

    def other_columns(self, given: Text) -> dict[str, Any]:
        return given.others

    def make_input(self, text: str, text_pair: str | None) -> Text:
        given = Text(COMMAND_LINE, text, text_pair)
        self._check_pairs(given, "give --text_pair, too", "with --text only")
        return given

    def _check_pairs(self, given: Text, for_pairs: str, for_texts: str) -> None:
        """Raise `UserError` if the model learned from pairs, but gets a single text, or the reverse."""
        if self.text_columns is None or (self.text_columns[1] is None) == (given.pair is None):
            return
        if given.pair is None:
            raise UserError(f"the model takes pairs of texts, but {given.place} has a single text: {for_pairs}")
        raise UserError(f"the model takes single texts, but {given.place} has a pair: give the text {for_texts}")

    def encode(
        self, tokenizer: transformers.PreTrainedTokenizerBase, inputs: Sequence[Text], max_seq_length: int
    ) -> Encoded:
        features = encode_texts(tokenizer, inputs, max_seq_length)
        if inputs[0].label is not None:
            features = [{**feature, "labels": text.label} for feature, text in zip(features, inputs, strict=True)]
        return Encoded(inputs, features)


def kept_columns(results: dict[str, Any]) -> TextColumns | None:
    """The columns of the training examples' texts; None if `results.json` does not have them.

    Raises:
        UserError: it has something else in their place.
    """
    match results.get(KEY):
        case None:
            return None
        case [str() as text, (str() | None) as pair]:
            return text, pair
        case other:
            raise UserError(f"{RESULTS} of the model has {KEY} in an unknown form ({other!r}): fine-tune it again")


def encode_texts(
    tokenizer: transformers.PreTrainedTokenizerBase, texts: Sequence[Text], max_seq_length: int
) -> list[dict[str, Any]]:
    """`input_ids` and `attention_mask` of each text. Long texts are cut, in a pair the longer one first, and a warning
    names the first. A special token's letters stay text, as in pretraining."""

    def tokens(chosen: Sequence[Text], **options: Any) -> Any:
        pairs = None if chosen[0].pair is None else [text.pair for text in chosen]
        return tokenizer([text.text for text in chosen], pairs, split_special_tokens=True, **options)

    encoded = tokens(
        texts, truncation=True, max_length=max_seq_length, return_attention_mask=True, return_token_type_ids=False
    )
    full = [text for text, ids in zip(texts, encoded["input_ids"], strict=True) if len(ids) == max_seq_length]
    if full:
        uncut = tokens(full, verbose=False)["input_ids"]
        cut = [text for text, ids in zip(full, uncut, strict=True) if len(ids) > max_seq_length]
        if cut:
            logger.warning(
                f"{len(cut)} of {len(texts)} texts are longer than {max_seq_length} tokens and were cut, first "
                f"{cut[0].place}"
            )
    return [
        {"input_ids": input_ids, "attention_mask": mask}
        for input_ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    ]


def asked(text: Text) -> dict[str, str]:
    return {"text": text.text} if text.pair is None else {"text": text.text, "text_pair": text.pair}


def heading(text: Text) -> str:
    return " | ".join(map(one_line, asked(text).values()))
