"""Spans of annotation tools' exports become words with tags; what does not fit the text is named by its row."""

from itertools import pairwise

import numpy as np
import orjson
import pytest

from ds_roberta.errors import UserError
from ds_roberta.finetuning.tag_metrics import find_entities
from ds_roberta.finetuning.token_classification import TagColumns, TokenClassification, read_sentences
from ds_roberta.inputs.tables import Table


def table(*rows):
    columns = dict.fromkeys(name for row in rows for name in row)
    return Table("x.json", tuple(columns), list(rows), list(range(1, len(rows) + 1)))


def read(*rows, labelled=True, **options):
    return read_sentences(table(*rows), TagColumns(**options), labelled=labelled)


def entities(sentence):
    """The entities that the tags mark, in characters."""
    found = find_entities(list(sentence.tags), np.ones(len(sentence.tags)))
    return [(sentence.offsets[each.start][0], sentence.offsets[each.end - 1][1], each.type) for each in found]


def result(start, end, label, text=None, **others):
    value = {"start": start, "end": end, **({} if text is None else {"text": text}), "labels": [label]}
    named = {"from_name": "label", "to_name": "text", "type": "labels", "origin": "manual"}
    return {"value": value, "id": "gew3t9fgkg", **named, **others}


def task(number, data, *annotations):
    made = [
        {
            "id": 10 * number + place,
            "completed_by": 1,
            "was_cancelled": False,
            "ground_truth": False,
            "result_count": 0,
            "task": number,
            **(annotation if isinstance(annotation, dict) else {"result": annotation}),
        }
        for place, annotation in enumerate(annotations)
    ]
    data = {"text": data} if isinstance(data, str) else data
    return {"id": number, "annotations": made, "drafts": [], "predictions": [], "data": data, "project": 1}


TEXT = "EU rejects Peter Blackburn 's  lamb."


def test_tasks_of_label_studio():
    (sentence,) = read(task(7, TEXT, [result(11, 26, "PER", "Peter Blackburn"), result(0, 2, "ORG")]))
    assert sentence.words == ("EU", "rejects", "Peter", "Blackburn", "'", "s", "lamb", ".")
    assert sentence.tags == ("B-ORG", "O", "B-PER", "I-PER", "O", "O", "O", "O")
    assert (sentence.place, sentence.text) == ("x.json, row 1", TEXT)


def test_annotations_of_label_studio(caplog):
    caplog.set_level("INFO")
    sentences = read(
        task(1, "a b", [result(0, 1, "X")], [result(2, 3, "X")]),
        task(2, "a b", {"result": [result(0, 3, "X")], "was_cancelled": True}, [result(0, 1, "Y")]),
        task(3, "a b", [result(0, 1, "X")], {"result": [result(2, 3, "Y")], "ground_truth": True}),
        task(4, "a b"),
        task(5, "a b", []),
        task(6, "a b", [result(0, 1, "X"), {"type": "relation", "from_id": "a", "to_id": "b", "direction": "right"}]),
    )
    assert [(sentence.place[-1], entities(sentence)) for sentence in sentences] == [
        ("1", [(0, 1, "X")]),
        ("1", [(2, 3, "X")]),
        ("2", [(0, 1, "Y")]),
        ("3", [(2, 3, "Y")]),
        ("5", []),
        ("6", [(0, 1, "X")]),
    ]
    assert [record.message for record in caplog.records] == [
        "x.json: annotations were skipped and are left out: 1",
        "x.json: annotations are left out because another is the ground truth: 1",
        "x.json: tasks have no annotation, or only skipped ones, and are left out: 1",
        "x.json: tasks have several annotations, each of which is an example: 1",
        "x.json: results of the type 'relation' are left out: 1",
    ]


def test_the_labelled_text_of_a_task(caplog):
    caplog.set_level("INFO")
    other = {"from_name": "c", "to_name": "text-1", "type": "choices", "value": {"choices": ["good"]}}
    (named,) = read(task(1, {"title": "t", "body": "a b", "text": "c"}, [result(0, 1, "X", to_name="body"), other]))
    assert named.text == "a b"
    (only,) = read(task(1, {"body": "a b", "number": 3}, [result(0, 1, "X", to_name="text-1")]))
    assert only.text == "a b"
    two = task(1, {"title": "t", "body": "a b"}, [result(0, 1, "X", to_name="text-1")])
    with pytest.raises(UserError, match=r"x.json has the texts 'title', 'body': give the one that is labelled as"):
        read(two)
    assert read(two, text_column="body")[0].text == "a b"
    both = task(1, {"text": "t", "body": "a b"}, [result(0, 1, "X", to_name="text"), result(2, 3, "Y", to_name="body")])
    with pytest.raises(UserError, match="give the one that is labelled"):
        read(both)
    assert entities(read(both, text_column="body")[0]) == [(2, 3, "Y")]
    assert "x.json: spans of another text are left out: 1" in caplog.text
    elsewhere = task(1, {"title": "t", "body": "a"}, [result(0, 1, "X", to_name=part) for part in ("left", "right")])
    with pytest.raises(UserError, match="give the one that is labelled"):
        read(elsewhere, text_column="body")
    groups = [result(0, 1, "X", to_name="text"), result(2, 3, "Y", from_name="chunk", to_name="body")]
    assert entities(read(task(1, {"text": "t", "body": "a b"}, groups), label_column="chunk")[0]) == [(2, 3, "Y")]
    assert [each.text for each in read(two, task(2, {"title": "t"}), labelled=False, text_column="title")] == ["t"] * 2


def test_one_of_several_groups_of_labels():
    row = task(1, "a b", [result(0, 1, "X"), result(0, 3, "NP", from_name="chunk")])
    with pytest.raises(UserError, match=r"spans in the columns 'label', 'chunk': give one of them as --label_column"):
        read(row)
    assert entities(read(row, label_column="chunk")[0]) == [(0, 3, "NP")]
    with pytest.raises(UserError, match=r"has no labels 'ner': give one of 'label', 'chunk' as --label_column"):
        read(row, label_column="ner")


def test_json_min_of_label_studio(caplog):
    caplog.set_level("INFO")
    about = {"annotator": 1, "annotation_id": 5, "created_at": "2026-01-01", "lead_time": 2.5}
    span = {"start": 11, "end": 26, "text": "Peter Blackburn", "labels": ["PER"]}
    first, second = read(
        {"text": TEXT, "id": 1, "ner": [span], **about},
        {"text": "a b", "id": 2, **about},
        {"text": "a b", "id": 3, **about, "annotation_id": None},
    )
    assert entities(first) == [(11, 26, "PER")]
    assert second.tags == ("O", "O")
    assert "x.json: rows that nobody annotated are left out: 1" in caplog.text


def test_rows_of_doccano(caplog):
    caplog.set_level("INFO")
    plain = {"id": 1, "text": TEXT, "label": [[0, 2, "ORG"], [11, 26, "PER"]], "Comments": []}
    for first, second in (
        read(plain, {"id": 2, "text": "a", "label": [], "Comments": []}),
        read(*({("labels" if name == "label" else name): value for name, value in row.items()} for row in
               (plain, {"id": 2, "text": "a", "label": []}))),
        read(
            {
                "id": 1,
                "text": TEXT,
                "entities": [
                    {"id": 4, "label": "PER", "start_offset": 11, "end_offset": 26},
                    {"id": 3, "label": "ORG", "start_offset": 0, "end_offset": 2},
                ],
                "relations": [{"id": 0, "from_id": 3, "to_id": 4, "type": "rejects"}],
                "Comments": [],
            },
            {"id": 2, "text": "a", "entities": [], "relations": [], "Comments": []},
        ),
    ):  # fmt: skip
        assert entities(first) == [(0, 2, "ORG"), (11, 26, "PER")]
        assert second.tags == ("O",)
    assert "x.json: relations are left out: 1" in caplog.text
    assert read({"text": "a b", "label": [], "relations": 5})[0].tags == ("O", "O")
    assert read({"sentence": "of its meta data", "text": "a b", "label": [[2, 3, "X"]]})[0].tags == ("O", "B-X")


def test_white_space_at_the_ends_of_spans_is_cut_off(caplog):
    caplog.set_level("INFO")
    (sentence,) = read({"text": TEXT, "label": [[10, 27, "PER"], [27, 29, "X"]]})
    assert entities(sentence) == [(11, 26, "PER"), (27, 29, "X")]
    assert "x.json: spans began or ended with white space, which is cut off: 1" in caplog.text


def test_tags_mark_exactly_the_spans(caplog):
    caplog.set_level("INFO")
    random = np.random.default_rng(0)
    rows = []
    for _ in range(200):
        text = "".join(random.choice(list("ab é😀-.'’\n, 1"), size=30))
        cuts = np.sort(random.choice(31, size=6, replace=False)).tolist()
        spans = [(start, end, str(random.choice(["X", "Y"]))) for start, end in pairwise(cuts)]
        kept = [[*span] for span in spans if text[span[0] : span[1]].strip() == text[span[0] : span[1]] != ""]
        rows.append({"text": text, "label": kept})
    sentences = read(*rows)
    assert sum(len(row["label"]) for row in rows) > 300
    for sentence, row in zip(sentences, rows, strict=True):
        assert [list(entity) for entity in entities(sentence)] == row["label"]
        assert "".join(sentence.words) == "".join(sentence.text.split())
        assert [sentence.text[slice(*span)] for span in sentence.offsets] == list(sentence.words)
    assert "x.json: spans begin or end inside a word, which is split there: " in caplog.text


def test_the_repeated_text_may_be_as_a_browser_shows_it():
    text = "Berlin,  Germany\r\nand Rome"
    for shown in (text, "Berlin, Germany and Rome", r"Berlin, Germany\n\nand Rome"):
        assert entities(read(task(1, text, [result(0, 26, "X", shown)]))[0]) == [(0, 26, "X")]


@pytest.mark.parametrize(
    ("text", "spans", "message"),
    [
        ("a b", [[0, 4, "X"]], r"x.json, row 2: the span 0 to 4 \(X\) leaves the text of 3 characters: fix or remove"),
        ("a b", [[-1, 1, "X"]], r"row 2: the span -1 to 1 \(X\) leaves the text"),
        ("a b", [[1, 1, "X"]], r"row 2: the span 1 to 1 \(X\) is empty"),
        ("a b", [[2, 1, "X"]], r"row 2: the span 2 to 1 \(X\) is empty"),
        ("a b", [[1, 2, "X"]], r"row 2: the span 1 to 2 \(X\) is empty"),
        (
            "ab c",
            [[1, 4, "X"], [0, 2, "Y"]],
            r"row 2: the span 0 to 2 \(Y\) overlaps the span 1 to 4 \(X\), but a",
        ),
        ("a b", [[0, 1, "X"], [0, 1, "X"]], r"row 2: the span 0 to 1 \(X\) overlaps"),
        ("a b", [[0, 1, ""]], r"row 2: the span \[0, 1, ''\] is neither \[start, end, label\] nor an object"),
        ("a b", [[0, "1", "X"]], r"row 2: the span \[0, '1', 'X'\] is neither"),
        ("a b", ["X"], "row 2: the span 'X' is neither"),
        ("a b", [{"start": 0, "end": 1}], r"row 2: the span \{'start': 0, 'end': 1\} is neither"),
        ("a b", [{"start": 0, "end": 1, "labels": ["X", "Y"]}], "row 2: the span 0 to 1 has 2 labels: give it one"),
        ("a b", [{"start": 0, "end": 1, "labels": []}], "row 2: the span 0 to 1 has 0 labels"),
        ("a b", None, r"row 2: 'label' is None, not a list of spans: write \[\] if there are none"),
        (
            "a b",
            [{"start": 0, "end": 1, "label": "X", "text": "b"}],
            r"\(X\) is 'a' in the text but 'b' in the file",
        ),
        (" ", [], "row 2: the text ' ' has no words"),
        (None, [], "row 2: 'text' is None, not a text"),
    ],
)
def test_a_bad_span_is_named(text, spans, message):
    with pytest.raises(UserError, match=message):
        read({"text": "a b", "label": [[0, 1, "X"]]}, {"text": text, "label": spans})


def test_a_span_without_a_label_is_named():
    with pytest.raises(UserError, match=r"x.json, row 2: the span \[0, 1\] has no label: write it as \[0, 1, label\]"):
        read({"text": "a b", "label": []}, {"text": "a b", "label": [[0, 1]]})
    with pytest.raises(UserError, match=r"row 2: the span \[2, 3\] has no label"):
        read({"text": "a b", "ner": [[0, 1, "X"]]}, {"text": "a b", "ner": [[0, 1, "X"], [2, 3]]})
    assert read({"text": "a b", "ner": [[0, 1, "X"]], "labels": [[0, 1]]})[0].tags == ("B-X", "O")


def test_offsets_in_utf_16_are_recognised():
    with pytest.raises(UserError, match=r"is 'nnota' in .* but 'annot' in the file, perhaps because some characters"):
        read(task(1, "😀😀 an annotation", [result(7, 12, "X", "annot")]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (task(2, "a"), "no task of 'x.json' is annotated"),
        ({"id": 2, "annotations": []}, "x.json, row 2 is not a task with 'data' and 'annotations'"),
        (task(2, "a") | {"annotations": [3]}, "x.json, row 2 has the annotation 3 without 'result': export it again"),
    ],
)
def test_a_bad_task_is_named(row, message):
    with pytest.raises(UserError, match=message):
        read(task(1, "a"), row)


def test_a_task_without_a_text_is_named():
    with pytest.raises(UserError, match=r"x.json, row 1 has no text in 'data': add the one that is labelled"):
        read({"id": 1, "data": {"number": 1}, "annotations": [{"result": []}]})


def test_rows_of_words_stay_rows_of_words():
    (sentence,) = read({"tokens": ["a b", "c"], "tags": ["B-X", "O"], "text": "a b c", "entities": [[0, 1, "Y"]]})
    assert (sentence.words, sentence.tags) == (("a b", "c"), ("B-X", "O"))
    with pytest.raises(UserError, match="no column 'tokens' or 'words': give one of 'text', 'label' as --text_column"):
        read({"text": "a b", "label": ["B-X", "O"]})


def test_a_task_learns_from_files_of_tools(tmp_path):
    exported = [task(1, "Anna saw", [result(0, 4, "PER")], []), task(2, "Bob saw", [result(0, 3, "PER", "Bob")])]
    (tmp_path / "train.json").write_bytes(orjson.dumps(exported))
    (tmp_path / "dev.jsonl").write_text('{"id": 5, "text": "Anna saw.", "label": [[0, 4, "PER"]], "Comments": []}\n')
    task_, splits = TokenClassification.from_data((str(tmp_path),), TagColumns())
    assert task_.names == ["O", "B-PER"]
    assert [each.tags for each in splits["train"]] == [("B-PER", "O"), ("O", "O"), ("B-PER", "O")]
    assert splits["validation"][0].tags == ("B-PER", "O", "O")
    asked = [each for name in ("train.json", "dev.jsonl") for each in task_.read_inputs(str(tmp_path / name))]
    assert [(each.text, each.tags) for each in asked] == [("Anna saw", ()), ("Bob saw", ()), ("Anna saw.", ())]
    assert [each.others["id"] for each in asked] == [1, 2, 5]


def test_annotations_of_one_text_stay_in_one_split(tmp_path):
    texts = [f"a{number} b" for number in range(12)]
    exported = [task(number, text, [result(0, 2, "X")], [result(0, 2, "X")]) for number, text in enumerate(texts)]
    (tmp_path / "train.json").write_bytes(orjson.dumps(exported))
    _, splits = TokenClassification.from_data((str(tmp_path),), TagColumns(validation_fraction=0.5))
    learned, held_out = ([each.text for each in splits[name]] for name in ("train", "validation"))
    assert len(learned) == len(held_out) == 12
    assert not set(learned) & set(held_out)
