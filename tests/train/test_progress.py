"""What the live line looks like on a terminal, which is played here, and in a file."""

import io
import re
import sys
import warnings

import pytest

from clipjax.train.progress import Progress, duration


class Time:
    """A clock that a test sets."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen(text):
    """What a terminal shows: carriage return, erase to the end of the line, new line."""
    lines, column = [""], 0
    for token in re.findall(r"\x1b\[K|.|\n", text, re.DOTALL):
        if token == "\x1b[K":
            lines[-1] = lines[-1][:column]
        elif token == "\r":
            column = 0
        elif token == "\n":
            lines, column = [*lines, ""], 0
        else:
            lines[-1] = lines[-1][:column] + token + lines[-1][column + 1 :]
            column += 1
    return lines


LINE = {"step": 20, "loss": 2.34567, "examples_per_second": 12345.6, "data_wait": 0.031}


def test_progress_is_plain_lines_where_there_is_no_terminal():
    now, stream = Time(), io.StringIO()
    with Progress(100, stream, now) as progress:
        assert sys.stderr is not progress
        for step in range(1, 41):
            now.seconds += 3
            progress.update(step, LINE | {"step": step - 10} if step % 20 == 0 else None)  # a line comes an interval late
    assert stream.getvalue().splitlines() == [
        "step 10/100  loss 2.346  12,346 examples/s  data wait 3%  4:00 min left",
        "step 30/100  loss 2.346  12,346 examples/s  data wait 3%  3:00 min left",
    ]


def test_the_share_of_bad_examples_is_shown_where_there_are_any():
    stream = io.StringIO()
    with Progress(100, stream, Time()) as progress:
        for shares in ({"bad_share": 0.0, "filtered_share": 0.0}, {"bad_share": 0.0004, "filtered_share": 0.25}):
            progress.update(20, LINE | shares)
    plain, bad = stream.getvalue().splitlines()
    assert plain.endswith("data wait 3%")
    assert bad.endswith("data wait 3%  bad 0.04%  filtered 25%")


def test_progress_redraws_one_line_and_warnings_stay_complete():
    now, terminal = Time(), Terminal()
    with Progress(100, terminal, now) as progress:
        for step in range(1, 101):
            now.seconds += 0.05
            progress.update(step, LINE if step == 20 else None)
            if step == 30:
                print("half", end=" ", file=sys.stderr)
            if step == 40:  # ten steps later, past the interval between two redraws
                print("a line", file=sys.stderr)
            if step == 60:
                sys.stderr.write(warnings.formatwarning("careful", UserWarning, "file.py", 1, line=""))
    assert sys.stderr is not progress
    assert 10 < terminal.getvalue().count("\r") < 40  # not at every step
    shown = screen(terminal.getvalue())
    assert shown[0] == "half a line"
    assert shown[1] == "file.py:1: UserWarning: careful"
    assert shown[-2] == "step 100/100  loss 2.346  12,346 examples/s  data wait 3%  0 s left"
    assert shown[-1] == ""
    assert not [line for line in shown if len(line) > 79]


def test_progress_fits_a_narrow_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(Progress, "_columns", lambda self: 24)
    with Progress(100, terminal, Time()) as progress:
        progress.update(20, LINE)
    assert screen(terminal.getvalue()) == ["step 20/100  loss 2.346", ""]


@pytest.mark.parametrize(("seconds", "text"), [
    (0.4, "0 s"), (59.6, "1:00 min"), (62, "1:02 min"), (3600, "1:00 h"), (11045, "3:04 h"), (2 * 86400 + 3 * 3600, "2 d 03 h"),
])  # fmt: skip
def test_duration(seconds, text):
    assert duration(seconds) == text
