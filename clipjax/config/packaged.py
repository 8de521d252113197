"""The configs and suites that come with clipjax. They are read like a user's own file; the package never imports them."""

import ast
import difflib
from pathlib import Path

from clipjax.config.fields import require


def config_folder() -> Path:
    """The folder of the packaged configs: `clipjax/_configs` in an installed wheel, `configs/` at the root of a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "_configs"
    return installed if installed.is_dir() else package.parent / "configs"


def packaged_configs() -> dict[str, Path]:
    """The file of every packaged config, by its NAME."""
    return {path.stem: path for path in sorted(config_folder().glob("*.py"))}


def summary(path: Path) -> str:
    """The first line of a config file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def packaged_config(name: str) -> Path:
    """The file of the packaged config NAME. Raises ConfigError for an unknown one, with the nearest that there is."""
    known = packaged_configs()
    nearest = ", ".join(difflib.get_close_matches(name, known, 1, cutoff=0))
    remedy = f"there is no packaged config of this name; the nearest is {nearest} (`clipjax configs` lists all)"
    require(name in known, "NAME", name, f"{remedy}; a path ends in .py or holds /")
    return known[name]


def config_path(text: str) -> Path:
    """The file that CONFIG.py|NAME means: what ends in .py or holds / is a path, all else names a packaged config."""
    return Path(text) if text.endswith(".py") or "/" in text else packaged_config(text)


def suites() -> dict[str, Path]:
    """The file of every suite that comes with clipjax, by its NAME."""
    folder = Path(__file__).parents[1] / "suites"
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}


def suite_path(text: str) -> Path:
    """The file that SUITE.py|NAME means. Raises ConfigError for a NAME that does not come with clipjax."""
    if text.endswith(".py") or "/" in text:
        return Path(text)
    known = suites()
    require(text in known, "SUITE", text, f"must be {', '.join(known)}, or a file: a path ends in .py or holds /")
    return known[text]
