"""Reading SQuAD's two versions and rows of questions: what is taken, and what is refused."""

import copy
import json

import pandas
import pytest

from ds_roberta.errors import UserError
from ds_roberta.finetuning.squad import is_unanswered, parse_squad, read_questions, read_squad, table_questions
from ds_roberta.inputs.tables import Table

CONTEXT = "The tower was built in 1889 by Gustave Eiffel."
FIRST = {
    "version": "1.1",
    "data": [
        {
            "title": "Tower",
            "paragraphs": [
                {
                    "context": CONTEXT,
                    "qas": [
                        {
                            "id": "a",
                            "question": "When was it built?",
                            "answers": [
                                {"text": "1889", "answer_start": 23},
                                {"text": "in 1889", "answer_start": 20},
                            ],
                        },
                        {
                            "id": "b",
                            "question": "Who built it?",
                            "answers": [{"text": "Gustave Eiffel", "answer_start": 31}],
                        },
                    ],
                }
            ],
        }
    ],
}


def changed(change):
    """A copy of the file, its first question changed."""
    content = copy.deepcopy(FIRST)
    change(content["data"][0]["paragraphs"][0]["qas"][0])
    return content


def test_the_first_version():
    found = parse_squad("train.json", FIRST)
    assert [(question.id, question.answers, question.start) for question in found] == [
        ("a", ("1889", "in 1889"), 23),
        ("b", ("Gustave Eiffel",), 31),
    ]
    assert not any(question.may_be_unanswerable for question in found)
    assert found[0].question == "When was it built?"
    assert found[0].context == CONTEXT


def test_the_second_version_may_have_no_answer():
    content = changed(lambda entry: entry.update(answers=[], is_impossible=True, plausible_answers=["x"]))
    found = parse_squad("train.json", content)
    assert all(question.may_be_unanswerable for question in found)
    assert (found[0].answers, found[0].start) == ((), None)
    marked_by_version = changed(lambda entry: entry.update(answers=[]))
    marked_by_version["version"] = "v2.0"
    assert parse_squad("train.json", marked_by_version)[0].answers == ()
    marked_by_version["version"] = "2023-05-01"
    with pytest.raises(UserError, match="answer"):
        parse_squad("train.json", marked_by_version)


def test_a_file_without_answers_serves_for_predictions():
    content = changed(lambda entry: entry.pop("answers"))
    assert [question.answers for question in parse_squad("x.json", content, labelled=False)] == [(), ()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda entry: entry["answers"][0].update(answer_start=24),
            r"'Tower'\), paragraph 1, question 'a': the answer '1889' is not at answer_start 24, which has '889 '",
        ),
        (
            lambda entry: entry["answers"][0].update(answer_start=4400),
            "question 'a': the answer '1889' at answer_start 4400 reaches beyond its context of 46 characters",
        ),
        (lambda entry: entry["answers"][0].update(answer_start=-1), "reaches beyond its context"),
        (lambda entry: entry["answers"][0].update(answer_start="23"), "an answer_start is '23', not a whole number"),
        (lambda entry: entry["answers"][0].update(text=" "), "'text' is ' ', not a text"),
        (lambda entry: entry.update(answers=[]), "question 'a' has no answers: give one"),
        (lambda entry: entry.pop("answers"), "question 'a' has no list 'answers'"),
        (lambda entry: entry.update(is_impossible=True), "question 'a' has answers and is_impossible"),
        (lambda entry: entry.update(id="b"), "the id 'b' occurs twice in the file"),
        (lambda entry: entry.pop("id"), "the 'id' is None, not a text"),
        (lambda entry: entry.update(question=3), "question 'a': 'question' is 3, not a text"),
    ],
)
def test_a_bad_question_is_named(change, message):
    with pytest.raises(UserError, match=message):
        parse_squad("train.json", changed(change))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "train.json' is not JSON"),
        ("[]", "train.json has no list 'data': give a file in SQuAD's format"),
        ('{"data": []}', "train.json' has no questions"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', "article 1, paragraph 1: 'context' is None"),
        ('{"data": [{"paragraphs": [{"context": "a", "qas": [1]}]}]}', "the question 1 is not a JSON object"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, content, message):
    path = tmp_path / "train.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_squad(path)
    with pytest.raises(UserError, match="cannot read"):
        read_squad(tmp_path / "absent.json")


def rows(*answers):
    of_rows = [
        {"id": f"q{number}", "question": "When?", "context": CONTEXT, "answers": of_row}
        for number, of_row in enumerate(answers)
    ]
    return Table("train.jsonl", tuple(of_rows[0]), of_rows, list(range(1, len(of_rows) + 1)))


def test_rows_as_the_library_datasets_has_them():
    found = table_questions(rows({"text": ["1889"], "answer_start": [23]}, [{"text": "built", "answer_start": 14}]))
    assert [(question.id, question.answers, question.start) for question in found] == [
        ("q0", ("1889",), 23),
        ("q1", ("built",), 14),
    ]
    assert not any(question.may_be_unanswerable for question in found)
    assert table_questions(rows({"text": ["1889"], "answer_start": [23]}, []))[0].may_be_unanswerable


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_a_csv_may_hold_answers_as_json_and_python_write_them(tmp_path, write):
    one, none = {"text": ["1889"], "answer_start": [23]}, {"text": [], "answer_start": []}
    shared = {"question": 'Built in "18" "89"?', "context": CONTEXT}
    answers = {"a": one, "b": none, "c": [{"text": "built", "answer_start": 14}]}
    of_rows = [
        {"id": name, **shared, "answers": write(given), "is_impossible": name == "b"} for name, given in answers.items()
    ]
    for name, separator in {"a.csv": ",", "a.tsv": "\t"}.items():
        pandas.DataFrame(of_rows).to_csv(tmp_path / name, index=False, sep=separator)
        found = read_questions(tmp_path / name)
        assert [(question.answers, question.start) for question in found] == [
            (("1889",), 23),
            ((), None),
            (("built",), 14),
        ]
        assert found[0].others["answers"] == one
    pandas.DataFrame([{**shared, "answers": write(none)}]).to_csv(tmp_path / "b.csv")
    assert is_unanswered(tmp_path / "b.csv")
    assert not is_unanswered(tmp_path / "a.csv")


def test_a_bad_row_is_named():
    with pytest.raises(UserError, match="row 1: 'answers' is '1889', not a list"):
        table_questions(rows("1889"))
    with pytest.raises(UserError, match=r"train.jsonl, row 2: the answer '1889' is not at answer_start 2,"):
        table_questions(rows({"text": ["1889"], "answer_start": [23]}, {"text": ["1889"], "answer_start": [2]}))
    with pytest.raises(UserError, match="row 1: 1 texts but 0 answer_start"):
        table_questions(rows({"text": ["1889"], "answer_start": []}))
    with pytest.raises(UserError, match="no column 'context', but 'question'"):
        table_questions(Table("x.jsonl", ("question",), [{"question": "When?"}], [1]), labelled=False)


ROW = {"id": "a", "question": "When?", "context": CONTEXT, "answers": {"text": ["1889"], "answer_start": [23]}}


@pytest.mark.parametrize(
    "content",
    [json.dumps([ROW, {**ROW, "id": "b"}]), json.dumps({"data": [ROW, {**ROW, "id": "b"}]}),
     json.dumps(ROW) + "\n" + json.dumps({**ROW, "id": "b"}) + "\n", json.dumps(ROW)],
)  # fmt: skip
def test_a_json_file_may_be_a_table(tmp_path, content):
    (tmp_path / "train.json").write_text(content)
    found = read_squad(tmp_path / "train.json")
    assert [(question.id, question.answers) for question in found] == [("a", ("1889",)), ("b", ("1889",))][: len(found)]
    assert len(found) == content.count("context")


def test_broken_json_lines_are_named(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps(ROW) + "\n{\n")
    with pytest.raises(UserError, match=r"train.json, row 2: not valid JSON"):
        read_squad(tmp_path / "train.json")


def test_the_answers_of_a_file_are_kept_for_predictions():
    answers = FIRST["data"][0]["paragraphs"][0]["qas"][1]["answers"]
    assert parse_squad("x.json", FIRST, labelled=False)[1].others == {"answers": answers}
    (question,) = table_questions(Table("x.jsonl", tuple(ROW), [{**ROW, "title": "t"}], [1]), labelled=False)
    assert question.others == {"answers": ROW["answers"], "title": "t"}
