"""The `earlyexit` command."""

import pytest

from langchain_earlyexit import __version__
from langchain_earlyexit.cli import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["demo", "ask", "bench", "pocket"]),
        (["ask", "--help"], ["--policy", "--budget", "default: deer"]),
        (["pocket", "eval", "--help"], ["--questions", "default: 2000"]),
        (["--version"], [__version__]),
    ],
)
def test_help_names_what_there_is(capsys, arguments, words):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0
    said = " ".join(capsys.readouterr().out.split())  # where lines break depends on the terminal
    assert all(word in said for word in words)


def test_ask_prints_thinking_answer_and_record(capsys, pocket):
    assert main(["ask", "What is 86 * 7?", "--model", pocket, "--seed", "1"]) == 0
    said = capsys.readouterr().out
    assert "\\boxed{" in said
    assert "'reason'" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ask", "x", "--policy", "soon"], "unknown exit policy 'soon'"),
        (["ask", "x", "--model", "./absent"], "no such model directory"),
        (["ask", "x", "--budget", "-3"], "thinking_budget must be -1"),
    ],
)
def test_bad_input_is_one_line_and_status_two(capsys, arguments, words):
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.startswith("earlyexit: ")


def test_the_demo_compares_three_policies_and_totals_them(capsys):
    assert main(["demo", "--questions", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("CoDE-Stop") >= 3
    assert "% saved" in said
    assert "exit record: {" in said
