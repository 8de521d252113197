"""`clipjax import --verify`: an imported run against its source, loaded by the library that wrote it."""

import json
import re
from pathlib import Path

import pytest

import clipjax
from clipjax import cli
from clipjax.export.compare.verify_import import verify_import
from clipjax.export.folder import export
from clipjax.export.found import Options
from tests import torch_reference
from tests.export import standins_transformers as transformers
from tests.export.models import LENGTH, TEXT, clip, parameters
from tests.export.standins_transformers import VISION, WORDS, torch
from tests.export.standins_transformers import transformers as theirs

torch_reference.load()
import open_clip  # noqa: E402


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
    transformers.change(folder / "preprocessor_config.json", resample=2)  # as SigLIP 2's
    assert command("transformers", folder, tmp_path / "bilinear") == 0
    said = capsys.readouterr().out
    assert "not imported: its images are resized bilinearly" in said
    assert "the original resizes images bilinearly, clipjax bicubically" in said
    assert command("transformers", folder, tmp_path / "larger", "--image-size", "64") == 2
    assert "--image-size = 64: transformers has the source's own size only: leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_tower_of_transformers_alone(tmp_path, tokenizer, capsys, tower):
    shape, kind = (VISION, "Vision") if tower == "image" else (WORDS | dict(eos_token_id=2), "Text")
    model = transformers.made(getattr(theirs, f"CLIP{kind}ModelWithProjection"), **shape, projection_dim=12)
    folder = transformers.written(tmp_path / "src", model, tokenizer if tower == "text" else None)
    assert command("transformers", folder, tmp_path / "run") == 0
    assert re.search(rf"same pixels or ids: {tower} \d.\de-0[78]\n", capsys.readouterr().out)


def test_a_training_checkpoint_of_open_clip(tmp_path, tokenizer, capsys):
    """Of a distributed run, with a buffer, at another image size: open_clip resizes its positions itself."""
    vision = dict(image_size=32, layers=1, width=32, head_width=16, patch_size=8)
    words = dict(context_length=LENGTH, vocab_size=TEXT["vocab_size"], width=32, heads=2, layers=1, hf_tokenizer_name="here")
    cfg = dict(embed_dim=24, vision_cfg=vision, text_cfg=words)
    state = {f"module.{name}": tensor for name, tensor in open_clip.CLIP(**cfg).state_dict().items()}
    folder, file = tmp_path / "src", tmp_path / "src" / "checkpoints" / "epoch_1.pt"
    file.parent.mkdir(parents=True)
    torch.save(dict(epoch=1, state_dict=state | {"module.attn_mask": torch.zeros(3, 3)}), file)
    (folder / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=cfg, preprocess_cfg=dict(resize_mode="squash"))))
    assert command("open_clip", file, tmp_path / "run", "--image-size", "52", "--tokenizer", str(tokenizer)) == 0
    shown = capsys.readouterr().out
    assert re.search(r"same pixels and ids: image \S+e-0[678], text \S+e-0[678]; logits \S+e-0[678]\n", shown)
    assert "not judged: strings: the tokenizer is that of --tokenizer" in shown
