import io

import pytest

from clipjax.config import Data
from clipjax.data import bar, reading
from clipjax.data.sources import open_source


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def source(images_tsv, monkeypatch):
    monkeypatch.setattr(bar, "DELAY", 0.0)
    return open_source(Data(spec=f"tsv:{images_tsv}"))


def test_texts_of_a_source(source, capsys):
    records = list(reading.texts(source))
    assert [record.captions for record in records] == [(f"number {i}",) for i in range(len(source))]
    assert all(record.image == b"" for record in records)
    said = capsys.readouterr().err
    assert said.splitlines()[-1].endswith(" captions/s]")  # although the name is longer than a terminal is wide
    assert all(line.startswith(f"{source.name}: ") for line in said.splitlines())


def test_a_terminal_has_one_line(source, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    list(reading.texts(source))
    assert "\r" in screen.getvalue()
    assert "\n" not in screen.getvalue().strip()


@pytest.mark.parametrize(("delay", "quiet"), [(5.0, False), (0.0, True)])
def test_short_work_and_other_processes_are_quiet(source, capsys, monkeypatch, delay, quiet):
    monkeypatch.setattr(bar, "DELAY", delay)
    assert len(list(reading.texts(source, quiet))) == len(source)
    assert capsys.readouterr().err == ""
