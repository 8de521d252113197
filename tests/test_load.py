"""Where a config comes from: a file with its neighbours, or a NAME that comes with clipjax."""

import inspect
import sys
from pathlib import Path

import pytest

from clipjax import cli, config
from clipjax.config import packaged
from clipjax.config.load import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = {path.stem for path in CONFIGS.glob("*.py")}
CONFIG = """
from shapes import WIDTH
from parts.text import DEPTH

from clipjax.config import Data, Run


class Extra: ...


def config() -> Run:
    from late import SEED

    return Run(data=Data(spec="emoji"), seed=SEED + WIDTH + DEPTH)
"""


def folder_of(path: Path, seed: int) -> Path:
    """A config file with a module and a package beside it, which hold numbers of this folder's own."""
    (path / "parts").mkdir(parents=True)
    (path / "mine.py").write_text(CONFIG)
    (path / "shapes.py").write_text(f"WIDTH = {10 * seed}\n")
    (path / "late.py").write_text(f"SEED = {seed}\n")
    (path / "parts" / "__init__.py").write_text("")
    (path / "parts" / "text.py").write_text(f"DEPTH = {100 * seed}\n")
    return path / "mine.py"


def test_a_config_imports_its_own_neighbours(tmp_path, monkeypatch):
    one, two = folder_of(tmp_path / "one", 1), folder_of(tmp_path / "two", 2)
    path = list(sys.path)
    monkeypatch.chdir(tmp_path)
    assert [load_config(str(file)).seed for file in (one, two, one, Path("two/mine.py"))] == [111, 222, 111, 222]
    assert sys.path == path


def test_neighbours_are_read_anew_and_other_modules_are_not(tmp_path):
    file = folder_of(tmp_path, 3)
    (tmp_path / "shapes.py").write_text("import wave\nWIDTH = 1\n")  # a module of Python's own that nothing else here imports
    assert load_config(str(file)).seed == 304
    library = sys.modules["wave"]
    (tmp_path / "shapes.py").write_text("import wave\nWIDTH = 20000\n")
    assert load_config(str(file)).seed == 20303
    assert sys.modules["wave"] is library


def test_a_class_of_a_config_file_can_be_looked_up(tmp_path):
    files = [folder_of(tmp_path / name, 1) for name in ("one", "two")]
    for file in files:
        load_config(str(file))
    modules = [m for m in sys.modules.values() if getattr(m, "__file__", None) in map(str, files)]
    assert [inspect.getsourcefile(module.Extra) for module in modules] == [str(file) for file in files]


def test_the_error_of_a_neighbour_names_the_line_that_imports_it(tmp_path, capsys):
    file = folder_of(tmp_path, 1)
    (tmp_path / "shapes.py").write_text("WIDTH = 1 / 0\n")
    before = list(sys.path)
    assert cli.main(["train", str(file), "--workdir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"clipjax: {file}, line 2: ZeroDivisionError: division by zero\n"
    assert sys.path == before


def test_names_and_paths():
    assert packaged.packaged_configs().keys() == NAMES
    assert packaged.config_path("emoji_clip") == CONFIGS / "emoji_clip.py"
    for path in ("emoji_clip.py", "./emoji_clip", "configs/emoji_clip.py", "/emoji_clip"):
        assert packaged.config_path(path) == Path(path)
    assert load_config("emoji_clip") == load_config(str(CONFIGS / "emoji_clip.py"))


def test_configs_lists_one_line_each(capsys):
    assert cli.main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(NAMES)
    for line in lines:
        name, _, text = line.partition(" ")
        assert (CONFIGS / f"{name}.py").read_text().startswith(f'"""{text.strip()}\n')
        assert len(line) <= 150


def test_a_printed_config_is_the_file(tmp_path, capsys):
    assert cli.main(["configs", "emoji_coca"]) == 0
    (tmp_path / "mine.py").write_text(capsys.readouterr().out)
    assert (tmp_path / "mine.py").read_bytes() == (CONFIGS / "emoji_coca.py").read_bytes()
    assert load_config(str(tmp_path / "mine.py")) == load_config("emoji_coca")


@pytest.mark.parametrize(
    "args", [["configs"], ["train", "--workdir", "run"], ["plan"], ["bench", "step"], ["bench", "input"]], ids=" ".join
)
def test_an_unknown_name_is_refused_with_the_nearest(args, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*args, "siglib_b16"]) == 2
    said = capsys.readouterr()
    assert "NAME = 'siglib_b16': there is no packaged config of this name; the nearest is siglip_b16" in said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "plan", "bench step", "bench input"])
def test_a_name_stands_where_a_file_can(command, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main([*command.split(), "emoji_coca", "--help"])
    assert f"usage: clipjax {command} emoji_coca" in capsys.readouterr().out


def test_a_checkout_reads_its_own_configs_and_a_wheel_those_inside(tmp_path, monkeypatch):
    assert packaged.config_folder() == CONFIGS
    package = tmp_path / "site-packages" / "clipjax"
    (package / "_configs").mkdir(parents=True)
    (package / "_configs" / "only.py").write_text('"""The only one.\n\nMore.\n"""\n')
    monkeypatch.setattr(packaged, "__file__", str(package / "config" / "packaged.py"))
    assert packaged.packaged_configs() == {"only": package / "_configs" / "only.py"}
    assert packaged.summary(packaged.packaged_config("only")) == "The only one."
    with pytest.raises(config.ConfigError, match="the nearest is only"):
        packaged.packaged_config("emoji_clip")
