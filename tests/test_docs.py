"""The documentation: it builds without a warning and without the network, and what it tells the reader to type is there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from clipjax.cli import make_parser
from clipjax.config.load import load_config
from clipjax.config.override import override
from clipjax.config.packaged import config_path, packaged_config

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("**/[!_]*.md"))
TEXTS = [ROOT / "README.md", *PAGES]
FILE = re.compile(r"This file, `(\w+\.py)`.*?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)  # one that the reader writes
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language, texts=TEXTS):
    return [(path, code) for path in texts for kind, code in BLOCK.findall(path.read_text()) if kind == language]


def commands():
    """Every command line of the bash blocks, and every `clipjax ...` with options in a table."""
    lines = [(path, line) for path, code in blocks("bash") for line in code.replace("\\\n", " ").splitlines()]
    for path in TEXTS:
        rows = [line for line in path.read_text().splitlines() if line.startswith("|")]
        lines += [(path, code) for row in rows for code in re.findall(r"`((?:clipjax|bash|python) [^`]* --[^`]*)`", row)]
    parts = [(path, shlex.split(line, comments=True)) for path, line in lines]
    return [(path, words) for path, words in parts if words]


def test_the_pages_build_without_warnings_and_load_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", tmp_path / "trees"]
    done = subprocess.run([*command, ROOT / "docs", tmp_path / "html"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    html = {path.stem: path.read_text() for path in (tmp_path / "html").glob("**/*.html")}
    assert set(html) >= {path.stem for path in PAGES} | {"search"}
    assert (tmp_path / "html" / "searchindex.js").exists()
    loaded = [tag for text in html.values() for tag in re.findall(r"<(?:script|link|img|iframe)[^>]*https?://[^>]*>", text)]
    assert not loaded
    assert 'id="Softmax.label_smoothing"' in html["configuration"]
    assert "pairwise_logsumexp" in html["api"]


def test_commands_are_real(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, code in FILE.findall((ROOT / "docs" / "extending.md").read_text()):
        (tmp_path / name).write_text(code)
    parsed = 0
    for path, words in commands():
        for script in (word for word in words if word.startswith(("launch/", "benchmarks/", "tests/"))):
            assert (ROOT / script).exists(), f"{path.name}: {script}"
        if "clipjax" not in words:
            continue
        words = words[words.index("clipjax") + 1 :]
        for end in (">", "|"):
            words = words[: words.index(end)] if end in words else words
        if "--help" in words:
            continue
        try:
            args, rest = make_parser().parse_known_args(words)
        except SystemExit:
            pytest.fail(f"{path.name}: clipjax {shlex.join(words)}")
        if args.fields:
            absent = "my_config" in args.config or path.name == "finetune.md"  # whose commands tests/export/test_finetune.py runs
            file = packaged_config("emoji_clip") if absent else config_path(args.config)
            if rest:
                override(load_config(str(file)), rest, "clipjax")
        else:
            assert not rest, f"{path.name}: {rest}"
        parsed += 1
    assert parsed > 30


def test_python_is_real():
    for path, code in blocks("python"):
        compiled = compile(code, path.name, "exec")
        if "clipjax.config" in code:
            names = {}
            exec(compiled, names)
            if "config" in names and "start_from" not in code:  # those need a run: tests/export/test_finetune.py has one
                names["config"]()


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_no_document_is_cited_that_is_not_here():
    for path in TEXTS:
        assert not re.findall(r"\b(?:METHODS|DESIGN|EVALS|FORMATS|CHIPS|PEERS)\b", path.read_text()), path.name


def test_the_source_tree_has_every_module_at_the_top():
    page = (ROOT / "docs" / "source-tree.md").read_text()
    paths = [path for path in (ROOT / "clipjax").iterdir() if not path.name.startswith("_") and path.name != "py.typed"]
    assert not [path.name for path in paths if path.name + "/" * path.is_dir() not in page]


def test_every_flag_of_open_clip_has_its_row():
    params = pytest.importorskip("open_clip_train.params")
    source = Path(params.__file__).read_text()
    flags = set(re.findall(r"""add_argument\(\s*['"](--[\w-]+)""", source))
    page = (ROOT / "docs" / "coming-from.md").read_text().partition("(from-big-vision)=")[0]
    cells = {cell for row in page.splitlines() if row.startswith("| `--") for cell in [row.split("|")[1]]}
    listed = {flag for cell in cells for flag in re.findall(r"`(--[\w-]+)`", cell)}
    assert len(flags) > 80
    assert listed == flags
