import pytest

from ds_roberta.errors import UserError, run_command, unknown_key_message


def run(command):
    with pytest.raises(SystemExit) as caught:
        run_command(command)
    return caught.value.code


def fail_with(error):
    def command():
        raise error

    return command


def test_a_commands_own_code_is_its_exit_code():
    assert run(lambda: None) == 0
    assert run(lambda: 0) == 0
    assert run(lambda: 85) == 85


def test_a_user_error_is_one_line_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert run(fail_with(UserError("the file 'x'\n  is missing: make it"))) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: the file 'x' is missing: make it\n"
    assert captured.out == ""


def test_the_first_process_of_a_host_alone_reports(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run(fail_with(UserError("wrong"))) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert run(fail_with(UserError("wrong"))) == 2
    assert capsys.readouterr().err == "error: wrong\n"


def test_an_interruption_is_no_traceback(capsys):
    assert run(fail_with(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_defect_of_the_program_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_command(fail_with(ZeroDivisionError()))
    with pytest.raises(ValueError, match="not the user's"):
        run_command(fail_with(ValueError("not the user's")))


def test_an_unknown_key_names_the_nearest_known_one_if_any_is_near():
    assert unknown_key_message("key", "stge", ["stage", "enabled"]) == "unknown key 'stge'; did you mean 'stage'?"
    assert unknown_key_message("option", "zzz", ["stage", "enabled"]) == "unknown option 'zzz'"
