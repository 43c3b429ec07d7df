import sys

import pytest

from qlora_jax.cli.main import main
from qlora_jax.cli.output import print_report
from qlora_jax.errors import (
    CheckpointError,
    Problems,
    UserError,
    did_you_mean,
    raise_problems,
    readable_bytes,
    say,
)


@pytest.mark.parametrize("error", [UserError, CheckpointError])
def test_a_user_error_is_a_value_error(error):
    for base in (ValueError, UserError):
        with pytest.raises(base, match="the reason"):
            raise error("the reason")


def test_nested_problems_are_one_flat_list_without_repetitions():
    problems = Problems("the data")
    with problems.collecting("[eval] "):
        raise_problems("x", ["`a` is wrong.", "`b` is wrong."], "train: ")
    problems.add("`c` is wrong.")
    problems.add("`c` is wrong.")
    with pytest.raises(UserError) as raised:
        problems.raise_if_any()
    assert str(raised.value) == (
        "3 problems with the data:\n"
        "- [eval] train: `a` is wrong.\n"
        "- [eval] train: `b` is wrong.\n"
        "- `c` is wrong."
    )
    assert len(raised.value.problems) == 3


def test_a_single_error_keeps_its_class():
    problems = Problems()
    with problems.collecting():
        raise CheckpointError("damaged")
    with pytest.raises(CheckpointError, match=r"^damaged$"):
        problems.raise_if_any()
    problems.add("and more")
    with pytest.raises(UserError, match=r"^2 problems:\n- damaged\n- and more$"):
        problems.raise_if_any()


def test_checking_stops_at_a_hundred_problems():
    problems = Problems("the data")
    with pytest.raises(UserError, match=r"^at least 100 problems with the data") as e:
        for number in range(200):
            problems.add(f"row {number}")
    assert str(e.value).endswith("- row 19\n- and 80 more of this kind or another")


def test_rows_with_the_same_problem_are_one_line():
    problems = Problems("the data")
    for row in (3, 1, 7, 8, 9, 10):
        problems.add(f"a.jsonl:{row}: no field `x`.")
    problems.add("a.jsonl:4: no field `y`.")
    problems.add("b.parquet row 2: no field `x`.")
    with pytest.raises(UserError) as raised:
        problems.raise_if_any()
    assert str(raised.value).splitlines() == [
        "8 problems with the data:",
        "- a.jsonl:3, 1, 7, 8, 9 and 1 more: no field `x`.",
        "- a.jsonl:4: no field `y`.",
        "- b.parquet row 2: no field `x`.",
    ]


def test_without_problems_nothing_is_raised():
    Problems("the data").raise_if_any()
    raise_problems("the data", [])


@pytest.mark.parametrize(
    ("names", "suggestion"),
    [
        ("learning_rat", " Did you mean `learning_rate`?"),
        (["stepz", "learning_rat"], " Did you mean `learning_rate`, `steps`?"),
        (["stepz", "steps_", "zzz"], " Did you mean `steps`?"),
        ("zzz", ""),
        ([], ""),
    ],
)
def test_close_names_are_suggested(names, suggestion):
    assert did_you_mean(names, iter(["steps", "learning_rate"])) == suggestion


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0.00 MB"), (1e8 - 1, "100.00 MB"), (1e8, "0.10 GB"), (2e12, "2,000.00 GB")],
)
def test_sizes_are_in_decimal_units(nbytes, text):
    assert readable_bytes(nbytes) == text


def test_progress_goes_to_stderr(capsys):
    say("a line")
    assert capsys.readouterr() == ("", "a line\n")


def test_messages_break_at_words_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "20")
    say("- a list of words-and-words\n\n    qlora-jax train run/config.toml")
    assert capsys.readouterr().err == (
        "- a list of\n  words-and-words\n\n    qlora-jax train run/config.toml\n"
    )


HOSTILE = "\x1b[31m\x07\x00\x9b\r\u202e\u2028\udfff"


def test_what_a_terminal_would_obey_is_shown_by_its_code_point(capsys):
    say(f"a\tb\nĀ€ {HOSTILE}")
    shown = "[U+001B][31m[U+0007][U+0000][U+009B][U+000D][U+202E][U+2028][U+DFFF]"
    assert capsys.readouterr().err == f"a\tb\nĀ€ {shown}\n"


def test_errors_and_reports_of_commands_are_shown_so(capsys, tmp_path):
    missing = f"{tmp_path}/\x1b[31m\u202e"
    assert main(["report", missing]) == 1
    print_report({f"k{HOSTILE}": HOSTILE, "n": {HOSTILE: [HOSTILE]}})
    written = capsys.readouterr()
    assert "[U+001B][31m" in written.err and "[U+DFFF]" in written.out
    assert not set(HOSTILE) - set("[31m") & set(written.err + written.out)
