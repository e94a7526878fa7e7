"""Tables and progress bars: readable on a terminal, plain elsewhere, never steered by data."""

import io
import re
import sys
from types import SimpleNamespace

import pytest

from lungwatch.cli import output
from lungwatch.cli.output import ProgressBar, print_table

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
HEADERS = ("id", "file", "overlay")
ROWS = [(1, "[red]a[/red]" * 5, "/overlays/" + "f" * 90), (2, "b\x1b[2J", None)]


class Terminal(io.StringIO):
    """A text stream that claims to be a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def use_terminal(monkeypatch):
    """Replace stdout and stderr by terminals of 60 columns; in the test, where pytest's are set."""

    def replace() -> tuple[Terminal, Terminal]:
        stdout, stderr = Terminal(), Terminal()
        monkeypatch.setenv("COLUMNS", "60")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        return stdout, stderr

    return replace


def test_a_table_has_one_line_a_row_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    print_table(HEADERS, ROWS)
    head, rule, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == list(HEADERS)
    assert set(rule) == {"-", " "}
    assert [line.split() for line in lines] == [
        ["1", ROWS[0][1], ROWS[0][2]],
        ["2", "b\\x1b[2J", "-"],
    ]


def test_a_table_without_rows_has_its_headers(capsys):
    print_table(HEADERS, [])
    assert capsys.readouterr().out.splitlines()[0].split() == list(HEADERS)


def test_a_table_too_wide_for_the_terminal_is_folded_and_nothing_is_cut_off(use_terminal):
    stdout, _ = use_terminal()
    print_table(HEADERS, ROWS)
    text = ESCAPE.sub("", stdout.getvalue())
    assert max(map(len, text.splitlines())) <= 60
    assert text.count("f") == ROWS[0][2].count("f") + 1  # and the one of "file"
    assert text.count("[") == ROWS[0][1].count("[") + 1, "markup in data is not interpreted"
    assert "\x1b[2J" not in stdout.getvalue()


def test_a_table_that_fits_the_terminal_is_not_folded(use_terminal):
    stdout, _ = use_terminal()
    print_table(HEADERS, [(1, "a", "b")])
    assert stdout.getvalue().splitlines()[-1] == "1   a     b"


def test_a_progress_bar_is_drawn_on_stderr_and_leaves_stdout_alone(use_terminal):
    stdout, stderr = use_terminal()
    with ProgressBar("reading images") as bar:
        advance = bar.start(3)
        for _ in range(3):
            advance(1)
        print("a result")
        bar.print_line("epoch 1: [red]0.5[/red]\x1b[2J")
    drawn = ESCAPE.sub("", stderr.getvalue())
    assert "reading images" in drawn
    assert "3/3" in drawn
    assert "epoch 1: [red]0.5[/red]\\x1b[2J" in drawn
    assert stdout.getvalue() == "a result\n"


def test_without_a_terminal_progress_is_a_plain_line_now_and_then(capsys, monkeypatch):
    times_s = iter([0.0, 1.0, 31.0, 31.0, 32.0, 62.0, 62.0, 63.0])
    monkeypatch.setattr(output, "time", SimpleNamespace(monotonic=lambda: next(times_s)))
    with ProgressBar("hashing", 5) as bar:
        for _ in range(4):
            bar.advance()
        bar.print_line("epoch 1: loss 0.5")
    said = capsys.readouterr()
    assert said.err.splitlines() == ["hashing: 2 of 5", "hashing: 4 of 5", "epoch 1: loss 0.5"]
    assert said.out == ""
