"""Reports in two columns; signals that end a process at once, or raise."""

import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from qlora_jax.cli.output import (
    Terminated,
    console,
    format_value,
    print_report,
    print_text,
    signals_raise,
)
from qlora_jax.runs.interruption import SIGNALS

pytestmark = pytest.mark.usefixtures("handlers")


def test_a_report_is_two_columns_with_nested_entries_indented(capsys):
    print_report({"r": 16, "groups": {"lora_A": 1234.5678, "[/b]": None}, "empty": {}})
    assert capsys.readouterr().out.splitlines() == [
        "r         16",
        "groups",
        "  lora_A  1234.57",
        "  [/b]    -",
        "empty     none",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "yes"),
        (False, "no"),
        (1234567, "1,234,567"),
        (0.1234567, "0.123457"),
        ([], "none"),
        (("a", 1), "a, 1"),
        ({"a": {"b": 1000}}, "a b 1,000"),
    ],
)
def test_values_have_no_python_names_and_six_digits(value, text):
    assert format_value(value) == text


def test_piped_lines_are_never_broken(capsys):
    console().print("x" * 5000)
    print_report({"name": "y" * 5000})
    assert [len(line) for line in capsys.readouterr().out.splitlines()] == [5000, 5006]


# --- signals ---


def test_sigterm_raises_inside_and_handlers_of_others_stay():
    with pytest.raises(Terminated), signals_raise():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def other(number, frame):
        raise AssertionError

    signal.signal(signal.SIGTERM, other)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with signals_raise():
        assert signal.getsignal(signal.SIGTERM) == other
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_another_thread_sets_no_handler():
    handlers = []

    def body():
        with signals_raise():
            handlers.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert handlers == [signal.SIG_DFL, signal.default_int_handler]


class RaisesSignal:
    """Receives a signal where no exception gets out."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)],
)
def test_a_signal_in_a_callback_of_the_collector_is_not_lost(number, raised):
    hook = sys.unraisablehook
    with pytest.raises(raised), signals_raise():
        collected = RaisesSignal(number)
        del collected  # the exception is raised here, and no one sees it
        time.sleep(60)
    assert sys.unraisablehook is hook


def run_python(code: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


IMPORTED = """
import signal, time
for name in {names}:
    try:
        signal.raise_signal(signal.Signals[name])
    except BaseException:
        print("caught")
    time.sleep(0.1)
print("imported", flush=True)
"""


@pytest.mark.parametrize("then", ["signal.pause()", "pass"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_waits_for_the_end_of_an_import_and_a_second_one_does_not(
    name, then, tmp_path
):
    """A library may catch the exception, or turn it into an ImportError."""
    status = 128 + signal.Signals[name]
    (tmp_path / "library.py").write_text(IMPORTED.format(names=[name]))
    lines = [
        "import signal, sys",
        "from qlora_jax.cli.output import report_stop, signals_raise",
        "signal.signal(signal.SIGINT, signal.default_int_handler)",
        f"sys.path.insert(0, {str(tmp_path)!r})",
        "try:",
        "    with signals_raise():",
        "        import library",
        f"        {then}",
        "except BaseException as error:",
        "    sys.exit(report_stop('qlora-jax', error))",
    ]
    how = "interrupted" if name == "SIGINT" else "terminated"
    expected = (status, "imported\n", f"qlora-jax: {how}.\n")
    assert run_python("\n".join(lines)) == expected
    (tmp_path / "library.py").write_text(IMPORTED.format(names=[name, name]))
    expected = (status, "", "\nEnded during an import.\n")
    assert run_python("\n".join(lines)) == expected


@pytest.mark.parametrize(("status", "orderly"), [(130, 0), (143, 0), (1, 1), (0, 1)])
def test_after_a_signal_the_process_leaves_at_once(status, orderly):
    code = (
        "import atexit, sys; from qlora_jax.cli.output import leave;"
        "atexit.register(print, 'orderly');"
        f"print('out'); print('err', file=sys.stderr); leave({status})"
    )
    assert run_python(code) == (status, "out\n" + "orderly\n" * orderly, "err\n")


# --- streams ---

HOSTILE = "a\x1b[31m\u202e\rb\ud800\n\tc"


@pytest.mark.parametrize("terminal", [False, True])
def test_text_is_exact_in_a_file_and_visible_on_a_terminal(monkeypatch, terminal):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", stream)
    # In pieces, as an answer is streamed.
    for piece in HOSTILE:
        print_text(piece, end="")
    shown = "a[U+001B][31m[U+202E][U+000D]b[U+D800]\n\tc"
    assert stream.getvalue() == (shown if terminal else HOSTILE)


def in_a_process(program: str, shell: str = "", env: dict[str, str] | None = None):
    """Runs Python code between `open_streams` and `leave`, streams as a shell says."""
    code = (
        "import sys\n"
        "from qlora_jax.cli.output import open_streams, leave, print_text\n"
        "from qlora_jax.errors import say\n"
        f"open_streams()\n{program}\nleave(0)\n"
    )
    return subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {shell}', sys.executable, code],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | (env or {}),
    )


FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="not Linux")


@pytest.mark.parametrize(
    ("program", "shell", "status", "out", "err"),
    [
        ("print(1)", ">&-", 0, "", "stdout is closed"),
        ("say('a'); print(1)", "2>&-", 0, "1\n", ""),
        ("print(repr(sys.stdin.read()))", "<&-", 0, "''\n", ""),
        # No file gets the number of a stream.
        ("print(open('/dev/null').fileno() > 2)", "<&- 2>&-", 0, "True\n", ""),
        pytest.param("say('a'); print(1)", "2>/dev/full", 0, "1\n", "", marks=FULL),
        pytest.param("print(1)", ">/dev/full", 1, "", "No space left", marks=FULL),
        ("print(1)", "| (exec <&-; sleep 0.5)", 0, "", ""),
        ("print(repr(sys.stdin.read()))", "< <(printf 'a\\xff')", 0, r"'a\udcff'", ""),
    ],
)
def test_streams_that_are_closed_full_or_not_text(program, shell, status, out, err):
    done = in_a_process(program, shell, {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": ""})
    assert (done.returncode, done.stdout.strip()) == (status, out.strip())
    assert err in done.stderr and "Traceback" not in done.stderr
    assert bool(done.stderr) == bool(err)


def test_an_encoding_that_lacks_characters_gets_escapes():
    env = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = in_a_process("print_text('a\\u65e5')", env=env)
    assert (done.returncode, done.stdout) == (0, "a\\u65e5\n")
