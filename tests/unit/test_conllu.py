"""CoNLL-U: which rows are words, and where their tags are."""

import pytest

from ds_roberta.errors import UserError
from ds_roberta.finetuning.conllu import is_conllu, parse_conllu
from ds_roberta.finetuning.token_classification import TagColumns, TokenClassification, read_sentences


def row(number, form, upos="X", xpos="_", misc="_"):
    return "\t".join([number, form, form.lower(), upos, xpos, "_", "0", "root", "_", misc]) + "\n"


FILE = (
    "# newdoc id = d1\n# sent_id = 1\n# text = Vámonos al mar\n"
    + row("1-2", "Vámonos", "_")
    + row("1", "Vamos", "VERB", "V", "NER=O")
    + row("2", "nos", "PRON", "P", "Entity=(x|NER=B-PER")
    + row("3-4", "al", "_", misc="SpaceAfter=No")
    + row("3", "a", "ADP", "I")
    + row("4", "el", "DET", "D", "SpaceAfter=No")
    + row("5", "mar", "NOUN", "N", "NER=B-LOC|Gloss=sea")
    + "\n# text = #\n"
    + row("1", "#", "SYM", "S")
    + row("1.1", "hay", "VERB", "V", "NER=B-X")
    + row("2", "10 000", "NUM", "C", "NER=O")
)


def parsed(*arguments, **options):
    return [(each.words, each.tags) for each in parse_conllu("x", FILE, *arguments, **options)]


def test_words_are_those_of_the_syntax():
    assert is_conllu(FILE)
    assert parsed() == [
        (("Vamos", "nos", "a", "el", "mar"), ("VERB", "PRON", "ADP", "DET", "NOUN")),
        (("#", "10 000"), ("SYM", "NUM")),
    ]
    assert [each.place for each in parse_conllu("x", FILE)] == ["x, row 5", "x, row 13"]
    assert parsed(labelled=False) == [(words, ()) for words, _ in parsed()]


def test_tags_of_another_column(caplog):
    assert [tags for _, tags in parsed("XPOS")] == [("V", "P", "I", "D", "N"), ("S", "C")]
    caplog.set_level("INFO")
    assert [tags for _, tags in parsed("NER")] == [("O", "B-PER", "O", "O", "B-LOC"), ("O", "O")]
    assert "x: 3 of 7 words have no NER and are outside of entities" in caplog.text


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("# text = a\n", "UPOS", "'x' has no sentences"),
        (row("1", "a") + "2\tb\n", "UPOS", "x, row 2 has 2 columns, CoNLL-U has 10"),
        (row("1", "a") + "# text = a\n", "UPOS", "x, row 2 has 4 columns, CoNLL-U has 10"),
        (row("1", "a") + row("1", "b"), "UPOS", "x, row 2 has the ID '1', but the next word is 2: fix the row, or sep"),
        (row("1", "a") + row("b", "b"), "UPOS", "x, row 2 has the ID 'b', but the next word is 2"),
        (row("1", " "), "UPOS", "x, row 1 has no word in its column FORM"),
        (row("1", "a", xpos="D") + row("2", "b"), "XPOS", "x, row 2 has no XPOS, unlike 1 other words: write it"),
        (row("1", "a", misc="Sem=A") + row("2", "b"), "Sem", "x, row 2 has no Sem, unlike 1 other words"),
        (row("1", "a"), "XPOS", "no word of 'x' has a tag 'XPOS': give UPOS, XPOS or a key in MISC as --conllu_column"),
        (row("1", "a", misc="NER=B-X") + row("2", "b", misc="NER=PER"), "NER", "x, row 2: the tag 'PER' is neither O"),
    ],
)
def test_a_bad_row_is_named(text, column, message):
    with pytest.raises(UserError, match=message):
        parse_conllu("x", text, column)


def test_files_of_ten_columns_are_distinguished_from_others():
    assert is_conllu("# a\n\n" + row("0.1", "a"))
    assert is_conllu(row("1-2", "al"))
    assert not is_conllu(row("The", "a"))
    assert not is_conllu("1 CD B-NP O\n")
    assert not is_conllu("")


def test_a_task_learns_the_chosen_column(tmp_path):
    for name in ("train.conllu", "dev.txt"):  # columns count, not endings
        (tmp_path / name).write_text(FILE)
    assert TokenClassification.from_data((str(tmp_path),), TagColumns())[0].names[:2] == ["ADP", "DET"]
    task, splits = TokenClassification.from_data((str(tmp_path),), TagColumns(conllu_column="NER"))
    assert task.names == ["O", "B-LOC", "B-PER"]
    assert splits["validation"][0].words[0] == "Vamos"
    asked = read_sentences(tmp_path / "dev.txt", TagColumns(), labelled=False)
    assert [each.words for each in asked] == [each.words for each in splits["train"]]
    assert asked[1].others == {"UPOS": ["SYM", "NUM"], "XPOS": ["S", "C"], "MISC": ["_", "NER=O"]}
