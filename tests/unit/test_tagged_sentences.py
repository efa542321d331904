"""Reading sentences with tags: CoNLL's columns and rows of lists."""

import pytest

from ds_roberta.errors import UserError
from ds_roberta.finetuning.tagged_sentences import (
    Sentence,
    are_of_entities,
    parse_conll,
    split_text,
    table_sentences,
    tag_names,
)
from ds_roberta.finetuning.token_classification import TagColumns, read_sentences
from ds_roberta.inputs.tables import Table

CONLL_2003 = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER
"""
WHOLE_FILE_OF_2003 = """-DOCSTART- -X- O O

CRICKET NNP I-NP O
- : O O
LEICESTERSHIRE NNP I-NP I-ORG
# CD I-NP O
" " O O

LONDON NNP I-NP I-LOC
1996-08-30 CD I-NP O

-DOCSTART- -X- O O

Somerset NNP I-NP I-ORG
83 CD I-NP O
"""


def test_columns_separated_by_spaces():
    sentences = parse_conll("train.conll", CONLL_2003)
    assert [(sentence.words, sentence.tags) for sentence in sentences] == [
        (("EU", "rejects"), ("B-ORG", "O")),
        (("Peter", "Blackburn"), ("B-PER", "I-PER")),
    ]
    assert [sentence.place for sentence in sentences] == ["train.conll, row 3", "train.conll, row 6"]
    assert tag_names(sentences) == ["O", "B-ORG", "B-PER", "I-PER"]


def test_the_layout_of_conll_2003():
    sentences = parse_conll("eng.train", WHOLE_FILE_OF_2003)
    assert [(sentence.place, sentence.words, sentence.tags) for sentence in sentences] == [
        ("eng.train, row 3", ("CRICKET", "-", "LEICESTERSHIRE", "#", '"'), ("O", "O", "I-ORG", "O", "O")),
        ("eng.train, row 9", ("LONDON", "1996-08-30"), ("I-LOC", "O")),
        ("eng.train, row 14", ("Somerset", "83"), ("I-ORG", "O")),
    ]


def test_columns_separated_by_tabs():
    (sentence,) = parse_conll("x", "New York\tB-LOC\r\n#\tO\r\n\t\r\n")
    assert sentence.words == ("New York", "#")
    assert sentence.tags == ("B-LOC", "O")


def test_a_header_is_no_word(caplog):
    with caplog.at_level("INFO"):
        (sentence,) = parse_conll("x", "\nWord\tPOS\nwords\tNNS\nfall\tVBP\n")
    assert (sentence.place, sentence.words, sentence.tags) == ("x, row 3", ("words", "fall"), ("NNS", "VBP"))
    assert "x: row 2 names the columns and is left out" in caplog.text
    assert parse_conll("x", "words NNS\nfall VBP\n")[0].words == ("words", "fall")
    for header in ("Token\tLabel", "FORM\tXPOS", "text\tPOS-tag"):
        assert parse_conll("x", f"{header}\nwords\tNNS\n")[0].words == ("words",)
    with pytest.raises(UserError, match=r"x, row 1 names the columns, the first of them 'id': move the words into the"):
        parse_conll("x", "id\tword\tpos\n1\twords\tNNS\n")


def test_a_first_row_that_may_be_a_header_of_other_names_is_named(caplog):
    rows = "words\tNNS\nfall\tVBP\nwords\tNNS\n"
    parse_conll("x", rows)
    parse_conll("x", "word\tpos\nfall\tVBP\nwords\tNNS\n")
    parse_conll("x", "Ada\tB-PER\nfalls\tO\n")
    assert not caplog.text
    parse_conll("x", f"Wort\tWortart\n{rows}")
    assert "x, row 1: no other row has the tag 'Wortart'; remove the row if it names the columns" in caplog.text


def test_comments_before_a_sentence():
    sentences = parse_conll("x", "# id 3 domain=en\na _ _ O\n\n# _ _ O\nb _ _ B-X")
    assert [sentence.words for sentence in sentences] == [("a",), ("#", "b")]


def test_a_hashtag_that_begins_a_sentence_is_no_comment():
    for separator in ("\t", " "):
        text = "#fail HT\nis VBZ\n\nthis DT\n#so HT\n\n#win HT\n".replace(" ", separator)
        assert [sentence.words for sentence in parse_conll("x", text)] == [("#fail", "is"), ("this", "#so"), ("#win",)]
    text = "# text = #win\n# words 2\n#win\tHT\nis\tVBZ\n\n#\tcomment\n# id\t17\nthis\tDT\n"
    assert [sentence.words for sentence in parse_conll("x", text)] == [("#win", "is"), ("this",)]


def test_only_blanks_and_tabs_separate_columns():
    text = "10\u00a0000  O\nEuro O \n \u00a0\nund O"
    assert [sentence.words for sentence in parse_conll("x", text)] == [("10\u00a0000", "Euro"), ("und",)]


def test_tags_of_each_word():
    sentences = parse_conll("x", "# text = a .\n# text = a SYM\n# SYM\na NOUN\n\nb VERB\nc SYM\n")
    assert [(sentence.words, sentence.tags) for sentence in sentences] == [
        (("#", "a"), ("SYM", "NOUN")),
        (("b", "c"), ("VERB", "SYM")),
    ]
    assert tag_names(sentences) == ["NOUN", "SYM", "VERB"]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-X PER", True),
        ("O B I", True),
        ("O", True),
        ("NOUN VERB", False),
        ("O PER", False),
        ("B NOUN", False),
        ("U-X O", True),
        ("B I L O U", True),
        ("L O U", False),  # letter case: lower, other, upper
        ("S----3MP1- VIIA-3MS-- G---------", False),  # a treebank's own parts of speech
    ],
)
def test_tags_of_entities_are_distinguished_from_those_of_words(tags, expected):
    assert are_of_entities(tags.split()) is expected


def test_words_without_tags_serve_for_predictions():
    assert [sentence.words for sentence in parse_conll("x", "a\nb\n\nc", labelled=False)] == [("a", "b"), ("c",)]
    text = "# text = c a\na\nc\n"
    assert [sentence.words for sentence in parse_conll("x", text, labelled=False)] == [("a", "c")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'x' has no sentences"),
        ("-DOCSTART- O\n\n", "'x' has no sentences"),
        ("a O\nb\n", "x, row 2 has the word 'b' but no tag"),
        ("a _ O\nb O\n", "x, row 2 has 2 columns, the first row with a word has 3"),
        (
            "a B-X\nb L-X\n\nc O\nd S-X",
            r"x, row 5: the tag 'S-X' belongs to IOBES, but 'L-X' \(x, row 2\) to BILUO",
        ),
        ("a B\nb E\nc U", r"x, row 3: the tag 'U' belongs to BILUO, but 'E' \(x, row 2\) to IOBES"),
        ("a O\n\nb NOUN\nc B-X", "x, row 3: the tag 'NOUN' is neither O nor like B-PER"),
        ("a O\n\tO", "x, row 2 has no word"),
        ("1 a O\n2 b O\n\n1 c O", "the first column of 'x' numbers the words: remove it"),
    ],
)
def test_a_bad_line_is_named(text, message):
    with pytest.raises(UserError, match=message):
        parse_conll("x", text)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_sentences(tmp_path / "absent.conll", TagColumns())
    (tmp_path / "latin.conll").write_bytes("é O".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 at byte 0"):
        read_sentences(tmp_path / "latin.conll", TagColumns())


def table(*rows):
    columns = dict.fromkeys(column for row in rows for column in row)
    return Table("x.jsonl", tuple(columns), list(rows), list(range(1, len(rows) + 1)))


def test_rows_of_lists():
    (sentence,) = table_sentences(table({"tokens": ["a", "b"], "tags": ["O", "B-X"]}), None, None)
    assert (sentence.words, sentence.tags, sentence.place) == (("a", "b"), ("O", "B-X"), "x.jsonl, row 1")
    (sentence,) = table_sentences(table({"w": ["a"], "t": ["O"]}), "w", "t")
    assert sentence.tags == ("O",)
    (sentence,) = table_sentences(table({"words": ["a"]}), None, None, labelled=False)
    assert (sentence.words, sentence.tags) == (("a",), ())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "row 2 has 2 words but 1 tags"),
        ({"tokens": [], "tags": []}, r"row 2: 'tokens' is \[\], not a list of texts"),
        ({"tokens": "a b", "tags": ["O"]}, "row 2: 'tokens' is 'a b', not a list of texts"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "row 2: item 2 of 'tokens' is ' '"),
        ({"tokens": ["a"], "tags": [0]}, "row 2: 'tags' has numbers: give their names, such as B-PER"),
        ({"tokens": ["a", 1], "tags": ["O", "O"]}, "row 2: item 2 of 'tokens' is 1 but must be non-empty text"),
        ({"tokens": ["a", "b"], "tags": ["B-X", "PER"]}, "row 2: the tag 'PER' is neither O nor like B-PER"),
        ({"tokens": ["a"]}, "row 2: 'tags' is None"),
    ],
)
def test_a_bad_row_is_named(row, message):
    with pytest.raises(UserError, match=message):
        table_sentences(table({"tokens": ["a"], "tags": ["O"]}, row), None, None)


def test_a_missing_column_is_named():
    with pytest.raises(UserError, match="no column 'tokens' or 'words': give one of 'text' as --text_column"):
        table_sentences(table({"text": "a"}), None, None)
    with pytest.raises(UserError, match="no column 'ner': give one of 'tokens' as --label_column"):
        table_sentences(table({"tokens": ["a"]}), None, "ner")


def test_texts_are_split_into_words_and_marks():
    sentence = split_text("x", "Dr. Smith-Jones (U.S.) isn't in Köln!")
    assert sentence.words == ("Dr", ".", "Smith-Jones", "(", "U.S", ".", ")", "isn't", "in", "Köln", "!")
    assert [sentence.text[slice(*span)] for span in sentence.offsets] == list(sentence.words)
    with pytest.raises(UserError, match="x: the text ' ' has no words"):
        split_text("x", " ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("cafe\u0301!", ["cafe\u0301", "!"]),
        ("می\u200cخواهم بروم", ["می\u200cخواهم", "بروم"]),
        ("在北京3天。", ["在", "北", "京", "3", "天", "。"]),
        ("ที่บ้าน", ["ที่", "บ้", "า", "น"]),
        ("👩\u200d👧 ok", ["👩\u200d👧", "ok"]),
    ],
)
def test_words_keep_their_marks_in_every_script(text, words):
    assert list(split_text("x", text).words) == words


def test_words_are_split_where_an_entity_begins_or_ends():
    sentence = split_text("x", "Pro-Berliner isn't Smith-Jones.", [(4, 10, "LOC"), (10, 12, "Y"), (19, 24, "PER")])
    assert sentence.words == ("Pro", "-", "Berlin", "er", "isn't", "Smith", "-", "Jones", ".")
    assert sentence.tags == ("O", "O", "B-LOC", "B-Y", "O", "B-PER", "O", "O", "O")
    assert split_text("x", "a b", []).tags == ("O", "O")


def test_offsets_of_words_without_a_text_are_those_in_their_joined_text():
    text, offsets = Sentence("x", ("New York", "is", "😀", "here")).located()
    assert text == "New York is 😀 here"
    assert [text[start:end] for start, end in offsets] == ["New York", "is", "😀", "here"]
    assert split_text("x", " a  b").located() == (" a  b", ((1, 2), (4, 5)))
