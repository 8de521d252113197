"""`clipjax import --verify`: an imported run against its source, loaded by the library that wrote it."""

import pytest

import clipjax
from clipjax import cli
from clipjax.config import ConfigError
from clipjax.export.folder import export
from clipjax.export.found import Options
from clipjax.export.verify_import import verify_import
from tests import torch_reference
from tests.export.models import clip, parameters

torch_reference.load()


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
    with pytest.raises(ConfigError, match="--image-size = 64: the original library has the source's own size only"):
        verify_import(tmp_path / "src", "open_clip", Options(None, 64), run.run, other, run.tokenizer)
