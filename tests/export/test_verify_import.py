"""`clipjax import --verify`: an imported run against its source, loaded by the library that wrote it."""

import re
from pathlib import Path

import pytest

import clipjax
from clipjax import cli
from clipjax.export.folder import export
from clipjax.export.found import Options
from clipjax.export.verify_import import verify_import
from tests.export import standins_transformers as transformers
from tests.export.models import clip, parameters
from tests.export.standins_transformers import VISION, WORDS
from tests.export.standins_transformers import transformers as theirs


def test_open_clip(tmp_path, tokenizer, capsys):
    model = clip()
    export(model, parameters(model), tokenizer, "squash", tmp_path / "src", "open_clip")
    command = ["import", "--from", "open_clip", str(tmp_path / "src"), "--out", str(tmp_path / "run"), "--verify"]
    assert cli.main(command) == 0
    assert "verified in PyTorch on 4 examples" in capsys.readouterr().out
    run = clipjax.load(tmp_path / "run")
    other = run.params | dict(log_scale=run.params["log_scale"] + 0.01)
    report, notes = verify_import(tmp_path / "src", "open_clip", Options(tokenizer), run.run, other, run.tokenizer)
    assert [failure.split()[0] for failure in report.failures] == ["logits"]
    assert notes == ["strings: the tokenizer is that of --tokenizer, not the source's"]


def command(origin: str, source: Path, out: Path, *options: str) -> int:
    return cli.main(["import", "--from", origin, str(source), "--out", str(out), "--verify", *options])


def test_transformers(tmp_path, tokenizer, capsys):
    """In float16, and with the ids of its own tokenizer."""
    folder = transformers.written(tmp_path / "src", transformers.siglip().half(), tokenizer)
    assert command("transformers", folder, tmp_path / "run") == 0
    shown = capsys.readouterr()
    assert "from image file and string" in shown.out
    run = clipjax.load(tmp_path / "run")
    other = run.params | dict(text=run.params["text"] | dict(positions=run.params["text"]["positions"][::-1]))
    report, _ = verify_import(folder, "transformers", Options(), run.run, other, run.tokenizer)
    assert [failure.split()[0] for failure in report.failures] == ["text", "logits", "string"]
    assert command("transformers", folder, tmp_path / "larger", "--image-size", "64") == 2
    assert "--image-size = 64: transformers has the source's own size only: leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_tower_of_transformers_alone(tmp_path, tokenizer, capsys, tower):
    shape, kind = (VISION, "Vision") if tower == "image" else (WORDS | dict(eos_token_id=2), "Text")
    model = transformers.made(getattr(theirs, f"CLIP{kind}ModelWithProjection"), **shape, projection_dim=12)
    folder = transformers.written(tmp_path / "src", model, tokenizer if tower == "text" else None)
    assert command("transformers", folder, tmp_path / "run") == 0
    assert re.search(rf"same pixels or ids: {tower} \d.\de-0[78]\n", capsys.readouterr().out)
