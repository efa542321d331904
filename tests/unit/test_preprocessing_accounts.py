"""Which documents are kept, what becomes of the others, and when a job stops for them."""

import gzip

import pytest
from prepare import forget_filter

from ds_roberta.errors import UserError
from ds_roberta.inputs.pieces import Piece, Reject
from preprocessing.commands import shard, train_tokenizer
from preprocessing.reading import accounts
from preprocessing.reading.accounts import (
    Account,
    BadDocuments,
    filter_checksum,
    input_infos,
    kept_documents,
    load_filter,
    located,
    summary_lines,
    total_accounts,
)
from preprocessing.reading.documents import ReadOptions
from preprocessing.units import ShardOptions


def accept(path, content, source="", **options):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    account = Account()
    piece = Piece(str(path), 0, path.stat().st_size, source)
    return list(kept_documents(piece, ReadOptions(**options), account)), account


@pytest.fixture
def with_filter(tmp_path, monkeypatch):
    """A function that writes the body of `judge(text, about)` as a module and returns its --filter name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, body):
        (tmp_path / f"{name}.py").write_text(f"def judge(text, about):\n    {body}\n")
        return f"{name}:judge"

    yield write
    load_filter.cache_clear()


def test_what_is_read_is_kept_or_rejected(tmp_path):
    found, account = accept(
        tmp_path / "a.txt", "one\n\n\u00a0\n\ntwo\n\nt\n\n" + "long " * 9, min_characters=2, max_characters=20
    )
    assert [document.text for document in found] == ["one", "two"]
    assert account.counts == {"kept": 2, "empty": 1, "too_short": 1, "too_long": 1}
    assert account.places == []


def test_length_is_counted_after_normalization_without_outer_white_space(tmp_path):
    content = "  e\u0301e\u0301  "
    assert accept(tmp_path / "a.txt", content, max_characters=3)[1].counts == {"too_long": 1}
    (document,) = accept(tmp_path / "a.txt", content, max_characters=2, normalization="NFC")[0]
    assert document.text.strip() == "éé"
    assert accept(tmp_path / "a.txt", "ﬁ", normalization="NFKC")[0][0].text == "fi"
    assert accept(tmp_path / "a.txt", "ﬁ", normalization="NFC")[0][0].text == "ﬁ"


def test_unicode_line_ends_end_lines_on_request(tmp_path):
    content = "one\u2028two\x85three\r\nfour"
    assert accept(tmp_path / "a.txt", content)[0][0].text == "one\u2028two\x85three\nfour"
    assert accept(tmp_path / "a.txt", content, newlines="unicode")[0][0].text == "one\ntwo\nthree\nfour"
    by_line, _ = accept(tmp_path / "a.txt", content, newlines="unicode", documents="line")
    assert [document.text for document in by_line] == ["one\ntwo\nthree", "four"]


def test_a_filter_sees_text_id_and_source_and_gives_the_reason(tmp_path, with_filter):
    name = with_filter(
        "filter_a",
        "return {'a': True, 'b': False, 'c': 'too dull'}[about['id']] if about['source'] == 'web' else text != 'x'",
    )
    lines = [f'{{"text": "x", "id": "{c}", "from": "web"}}\n' for c in "abc"] + ['{"text": "x"}\n', '{"text": "y"}\n']
    found, account = accept(
        tmp_path / "a.jsonl", "".join(lines), "named", filter=name, id_column="id", source_column="from"
    )
    assert [(d.text, d.id, d.source) for d in found] == [("x", "a", "web"), ("y", None, "named")]
    assert account.counts == {"kept": 2, "filter": 2, "filter:too dull": 1}
    assert account.bad == 0


def test_a_changed_file_of_a_filter_is_noticed_however_the_filter_was_made(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "filter_of_a_part.py"
    text = "import functools\ndef longer(least, text, _): return len(text) > least\nkeep = functools.partial(longer, 3)"
    file.write_text(text)
    before = filter_checksum("filter_of_a_part:keep")
    file.write_text(text.replace("3", "4"))
    forget_filter("filter_of_a_part")
    assert filter_checksum("filter_of_a_part:keep") != before
    assert filter_checksum("operator:eq")


def test_a_filter_that_was_edited_after_its_import_is_refused(tmp_path, tokenizer_folder, with_filter):
    name = with_filter("filter_edited", "return True")
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    inputs, options = [str(tmp_path / "a.txt")], ReadOptions(filter=name)
    shard(inputs, tokenizer_folder, tmp_path / "out", ShardOptions(options, 0.0), workers=1)
    with_filter("filter_edited", "return text == 'one'")
    message = "filter_edited.py' has changed since this process imported --filter filter_edited:judge.*restart"
    with pytest.raises(UserError, match=message):
        shard(inputs, tokenizer_folder, tmp_path / "out", ShardOptions(options, 0.0), workers=1)
    with pytest.raises(UserError, match=message):
        train_tokenizer(inputs, tmp_path / "tokenizer", 300, options)


def test_a_filter_that_fails_or_returns_nothing_ends_the_job_with_its_name(tmp_path, with_filter):
    for name, body, message in [("f1", "return None", "returned None"), ("f2", "return 1 / 0", "ZeroDivisionError")]:
        with pytest.raises(UserError, match=f"--filter {name}:judge.*{message}"):
            accept(tmp_path / "a.txt", "text", filter=with_filter(name, body))
    for name in ("nothing_here:f", "json:nothing", "json", "json:__doc__"):
        with pytest.raises(UserError, match=f"--filter '{name}'"):
            load_filter(name)


def test_only_the_first_places_are_kept_in_the_order_of_the_file():
    parts = []
    for part in range(3):
        account = Account()
        for i in range(3):
            account.reject("a.txt", Reject("not_utf8", 10 * part + i, "bad"))
            account.reject("a.txt", Reject("empty", 0))
        parts.append({"a.txt": account})
    (info,) = input_infos(total_accounts(["a.txt"], parts), {"a.txt": "books"})
    assert (info.documents_read, info.documents_kept, info.rejected) == (18, 0, {"empty": 9, "not_utf8": 9})
    assert [place["byte"] for place in info.places] == [0, 1, 2, 10, 11]
    assert info.source == "books"


def account_of(kept=0, bad=0, offset=0):
    account = Account()
    account.counts["kept"] += kept
    for _ in range(bad):
        account.reject("x.txt", Reject("not_utf8", offset, "byte 0xff is not UTF-8"))
    return account


def test_a_job_stops_above_the_fraction_and_names_the_worst_file(tmp_path):
    paths = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    (tmp_path / "b.txt").write_bytes(b"one\n\n\xff")
    bad = BadDocuments(0.1, ReadOptions())
    bad.add({paths[0]: account_of(26, 1), paths[1]: account_of(1, 2, offset=5)})
    bad.check()
    bad.add({paths[0]: account_of(0, 1)})
    bad.add({paths[1]: account_of(0, 1)})
    with pytest.raises(UserError, match=r"5 of 32 .*0\.1.*\(3\).*b\.txt', line 3 \(byte 5\): .*UTF-8.*iconv"):
        bad.check()


def test_a_job_stops_early_once_enough_was_read(monkeypatch):
    monkeypatch.setattr(accounts, "MIN_DOCUMENTS_TO_STOP", 20)
    bad = BadDocuments(0.5, ReadOptions())
    bad.add({"a.txt": account_of(1, 18)})
    with pytest.raises(UserError, match=r"20 of 21 .*\(18\) in 'a\.txt'"):
        bad.add({"b.txt": account_of(0, 2)})


def test_a_column_without_values_is_noted_once_before_the_end(monkeypatch, capsys):
    monkeypatch.setattr(accounts, "MIN_DOCUMENTS_TO_STOP", 3)
    bad, notes = BadDocuments(0.5, ReadOptions(id_column="key")), []
    for value in (None, None, None, "id"):
        part = account_of(2)
        part.count_value("id_column", value)
        bad.add({"a.jsonl": part})
        notes.append("none of the first 4 documents has a value in --id_column 'key'" in capsys.readouterr().out)
        if value is None:
            with pytest.raises(UserError, match="no document has a value in --id_column 'key'"):
                bad.check_columns()
    assert notes == [False, True, False, False]
    bad.check_columns()


def test_a_place_in_a_compressed_file_has_the_line_of_its_text(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one\n\nthr\xff"))
    (place,) = accept(path, path.read_bytes())[1].places
    assert located(str(path), place).endswith("line 3 (byte 5): byte 8 (0xff) is not UTF-8")


def test_the_closing_table_has_a_line_for_every_file_or_says_how_many_more():
    accounts_ = {f"{i}.parquet": account_of(3, i == 28) for i in range(30)}
    accounts_["28.parquet"].places = [{"reason": "corrupt", "row": 7, "detail": "torn"}]
    lines = summary_lines(input_infos(accounts_, {}))
    assert lines[0].endswith("91 read = 90 kept + 1 not_utf8 rejected, from 30 files")
    assert lines[1:] == [
        "  28.parquet: 4 read = 3 kept + 1 not_utf8 rejected",
        "  … and 29 more files, all of them in the manifest",
        "bad         '28.parquet', row 7: torn",
    ]
    assert len(summary_lines(input_infos(dict(list(accounts_.items())[:9]), {}))) == 10
