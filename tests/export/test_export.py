"""Exported folders, loaded by open_clip and transformers and compared with ours, from image file and string to embedding."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from clipjax.config import ConfigError, ImageTower, Model, TextTower
from clipjax.data.tokenizer import Tokenizer
from clipjax.export.compare.reference import load
from clipjax.export.compare.unjudged import CLEANED
from clipjax.export.compare.verify import encode, verify
from clipjax.export.folder import export
from clipjax.models.clip import init
from tests import torch_reference
from tests.export.models import CAPTIONS, LENGTH, TEXT, check, clip, parameters, siglip

torch_reference.load()

CASES = {
    "clip": (clip(), "open_clip", "squash"),
    "clip cropped": (clip(), "open_clip", "crop"),
    "clip quick_gelu": (clip(dict(activation="quick_gelu"), dict(activation="quick_gelu")), "open_clip", "squash"),
    "clip sincos bias": (clip(dict(positions="sincos2d"), init_bias=-10.0), "open_clip", "squash"),
    "clip to transformers": (clip(dict(activation="gelu_tanh")), "transformers", "squash"),
    "clip cropped to transformers": (clip(), "transformers", "crop"),
    "clip sincos to transformers": (clip(dict(positions="sincos2d", patch_dropout=0.5)), "transformers", "squash"),
    "siglip to transformers": (siglip(dict(activation="gelu_tanh")), "transformers", "squash"),
    "siglip softmax to transformers": (siglip(text=dict(projection_bias=False), init_bias=None), "transformers", "squash"),
}


@pytest.mark.parametrize(("model", "to", "resize"), CASES.values(), ids=CASES.keys())
def test_same_embeddings(tmp_path, tokenizer, images, model, to, resize):
    params = parameters(model)
    assert model.dtype == "bfloat16"  # the towers' arithmetic, not the weights'
    export(model, params, tokenizer, resize, tmp_path / "out", to)
    report = check(tmp_path / "out", to, model, params, tokenizer, images, resize)
    assert report.failures == []
    assert max(report.image, report.text, report.logits) < 1e-5
    assert report.notes == []
    margin = to == "transformers" and resize == "crop"
    drawn = {item.drawn: item for item in [*report.images, *report.strings] if item.drawn is not None}
    unjudged = {name for name, item in drawn.items() if item.judged is None}
    assert unjudged == {"a transparent image", "a sideways image"} | (
        {"an image whose crop has an odd margin"} if margin else set()
    )
    assert all(drawn[name].distance > 1e-3 for name in unjudged)
    cleaned = {name for name, item in drawn.items() if item.reason == CLEANED}
    assert cleaned == (
        {"a caption with entities"} if to == "open_clip" else set()
    )  # it straightens curly quotes, as our tokenizer
    assert len(drawn) == 8
    weights = safetensors.numpy.load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert {tensor.dtype for tensor in weights.values()} == {np.dtype("float32")}


def test_what_is_no_failure_is_reported(tmp_path, tokenizer, images):
    """open_clip turns HTML entities into characters before it tokenizes a string; transformers does not."""
    model = clip()
    captions, images = [*CAPTIONS[:4], "man &amp; woman"], [*images[:4], images[0].resize((35, 32))]
    for to, resize in (("open_clip", "squash"), ("transformers", "crop")):
        export(model, parameters(model), tokenizer, resize, tmp_path / to, to)
    report = verify(tmp_path / "open_clip", "open_clip", model, parameters(model), tokenizer, "squash", images, captions)
    assert report.failures == []
    assert len(report.notes) == 1
    assert re.fullmatch(r"1 of 5 strings \(20.0%\), which differ by up to \d.\de[+-]\d\d: open_clip cleans.*", report.notes[0])
    report = verify(tmp_path / "transformers", "transformers", model, parameters(model), tokenizer, "crop", images, captions)
    assert report.failures == []
    assert len(report.notes) == 1
    assert re.fullmatch(r"1 of 5 image files .20.0%., which differ by up to \d.\de-\d\d: transformers rounds.*", report.notes[0])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side", "activation"), [("B/32", 256, "gelu_tanh")])
def test_siglip_in_open_clip(tmp_path, tokenizer, images, name, side, activation):
    """timm's towers have one size each, so this is a real one."""
    image = ImageTower.siglip(name, image_size=side, activation=activation)
    text = TextTower.siglip("B", **TEXT | dict(embed_dim=768, activation=activation))
    model = Model(image=image, text=text, init_bias=-10.0)
    params = parameters(model)
    export(model, params, tokenizer, "squash", tmp_path / "out", "open_clip")
    report = check(tmp_path / "out", "open_clip", model, params, tokenizer, images)
    assert report.failures == []
    assert max(report.image, report.text) < 1e-5


@pytest.mark.parametrize("to", ["open_clip", "transformers"])
def test_verify_finds_what_differs(tmp_path, tokenizer, images, to):
    model, out = clip(), tmp_path / "out"
    params = parameters(model)
    export(model, params, tokenizer, "squash", out, to)

    def failures():
        return [failure.split()[0] for failure in check(out, to, model, params, tokenizer, images).failures]

    file = next(out.glob("*.safetensors"))
    weights = safetensors.numpy.load_file(file)
    name = {"open_clip": "visual.ln_post.bias", "transformers": "vision_model.post_layernorm.bias"}[to]
    safetensors.numpy.save_file(weights | {name: weights[name] + 3e-3}, file, {"format": "pt"})
    assert failures() == ["image", "logits", "image_file"]
    safetensors.numpy.save_file(weights, file, {"format": "pt"})
    assert failures() == []
    file = out / {"open_clip": "open_clip_config.json", "transformers": "preprocessor_config.json"}[to]
    text = file.read_text()
    file.write_text(text.replace("0.48145466", "0.47"))
    assert failures() == ["image_file"]
    file.write_text(text)
    words = json.loads((out / "tokenizer.json").read_text())
    words["normalizer"]["normalizers"] = [n for n in words["normalizer"]["normalizers"] if n["type"] != "Lowercase"]
    (out / "tokenizer.json").write_text(json.dumps(words))
    assert failures() == ["string"]


def test_transformers_auto_processor(tmp_path, tokenizer, images):
    """What a user of transformers calls first: `AutoProcessor` and the model's own forward on its output."""
    from transformers import AutoModel, AutoProcessor

    for model in (clip(), siglip()):
        out = tmp_path / model.image.pool
        export(model, parameters(model), tokenizer, "squash", out, "transformers")
        processor = AutoProcessor.from_pretrained(out)
        batch = processor(text=CAPTIONS, images=images, padding="max_length", truncation=True, return_tensors="pt")
        np.testing.assert_array_equal(batch["input_ids"], Tokenizer.load(tokenizer, LENGTH).encode(CAPTIONS)[0])
        reference = load(out, "transformers")
        # The default backend resizes with torchvision, whose rounding differs from PIL's by up to one level of 255.
        pixels = reference.pixels(images)
        assert (batch["pixel_values"] - pixels).abs().max() <= 1.01 / 255 / min(model.image.std)
        assert AutoModel.from_pretrained(out)(**batch).logits_per_image.shape == (5, 5)


@pytest.mark.parametrize("to", ["open_clip", "transformers"])
def test_half_precision(tmp_path, tokenizer, images, to):
    """Compared with the rounded weights; how far the rounding moves a vector is told."""
    model = clip(dict(positions="sincos2d"))
    export(model, parameters(model), tokenizer, "squash", tmp_path / "out", to, "none", "bfloat16")
    arguments = tmp_path / "out", to, model, parameters(model), tokenizer, "squash", images, CAPTIONS, "none", ()
    report = verify(*arguments, "bfloat16")
    assert report.failures == []
    assert max(report.image, report.text) < 1e-5
    assert 1e-4 < min(report.rounding) < max(report.rounding) < 0.1
    assert sum(line.startswith("rounding of the weights: image ") for line in report.figures) == 1
    assert {failure.split()[0] for failure in verify(*arguments).failures} > {"image", "text"}


def test_sentence_transformers_pads_texts_that_see_padding(tmp_path, tokenizer):
    """Its own processor with the arguments of the file, and the method that it names; by hand with 5.4.0 and 6.2.0."""
    from transformers import AutoModel, AutoProcessor

    for model in (clip(), siglip()):
        out, params = tmp_path / model.image.pool, parameters(model)
        export(model, params, tokenizer, "squash", out, "transformers")
        modules, settings = (json.loads((out / name).read_text()) for name in ("modules.json", "sentence_bert_config.json"))
        assert (len(modules), modules[0]["path"]) == (1, "")
        processor = AutoProcessor.from_pretrained(out, **settings["processor_kwargs"])
        assert type(processor.image_processor).__name__.endswith("Pil")
        arguments = dict(padding=True, truncation="longest_first") | settings.get("processing_kwargs", {}).get("text", {})
        batch = processor(text=["flag"], return_tensors="pt", **arguments)
        method = settings["modality_config"]["text"]
        vectors = getattr(AutoModel.from_pretrained(out), method["method"])(**batch)[method["method_output_name"]]
        vector = vectors.detach().numpy() / np.linalg.norm(vectors.detach().numpy())
        pixels, ids = np.zeros((1, 32, 32, 3), np.uint8), Tokenizer.load(tokenizer, LENGTH).encode(["flag"])[0]
        assert np.linalg.norm(vector - encode(model, params, pixels, ids).text) < 1e-5


def test_replaces_an_earlier_export_only(tmp_path, tokenizer):
    model, out = clip(), tmp_path / "new" / "out"
    for to in ("open_clip", "transformers", "open_clip"):
        export(model, parameters(model), tokenizer, "squash", out, to)
    names = {"open_clip_model.safetensors", "open_clip_config.json"}
    names |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    other = tmp_path / "other"
    other.mkdir()
    safetensors.numpy.save_file({"a": np.zeros(1)}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="name another folder"):
        export(model, parameters(model), tokenizer, "squash", other, "transformers")
    with pytest.raises(ConfigError, match="is a file"):
        export(model, parameters(model), tokenizer, "squash", other / "model.safetensors", "transformers")


def test_files_of_others_stay(tmp_path, tokenizer):
    """A model card, and the history of a folder that is shared with git."""
    model, out = clip(), tmp_path / "out"
    export(model, parameters(model), tokenizer, "squash", out, "open_clip")
    before = (out / "open_clip_model.safetensors").read_bytes()
    (out / "README.md").write_text("# My model")
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref: refs/heads/main")
    export(model, parameters(model) | {"log_scale": np.float32(1)}, tokenizer, "squash", out, "open_clip")
    assert (out / "README.md").read_text() == "# My model"
    assert (out / ".git" / "HEAD").read_text() == "ref: refs/heads/main"
    assert (out / "open_clip_model.safetensors").read_bytes() != before


def test_a_failed_rename_keeps_the_last_export(tmp_path, tokenizer, monkeypatch):
    model, out = clip(), tmp_path / "out"
    export(model, parameters(model), tokenizer, "squash", out, "open_clip")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    rename = Path.rename

    def refuse(path, target):
        if path.name == "fresh":
            raise OSError("stale file handle")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="stale file handle"):
        export(model, parameters(model), tokenizer, "squash", out, "open_clip")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_export_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    model, out = clip(), tmp_path / "out"
    export(model, parameters(model), tokenizer, "squash", out, "open_clip")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        export(replace(model, init_bias=-1.0), parameters(replace(model, init_bias=-1.0)), tokenizer, "squash", out, "open_clip")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


REFUSED = {
    "mean": (clip(dict(pool="mean")), "open_clip", "model.image.pool = 'mean'"),
    "mean hf": (clip(dict(pool="mean")), "transformers", "model.image.pool = 'mean'"),
    "size": (
        siglip(),
        "open_clip",
        "48 wide, 2 deep.*timm's published sizes.*vit_base_patch32.*use --to transformers",
    ),
    "bias": (clip(init_bias=-10.0), "transformers", "model.init_bias = -10.0: .*--to open_clip"),
    "patch bias": (clip(dict(patch_bias=True)), "open_clip", "model.image.patch_bias = True"),
    "quick": (clip(text=dict(activation="quick_gelu")), "open_clip", "model.text.activation = 'quick_gelu'"),
    "text": (clip(text=dict(causal=False, pool="last")), "transformers", "model.text.causal = False: CLIPModel"),
    "pool": (clip(text=dict(pool="last")), "transformers", "model.text.pool = 'last': CLIPModel"),
    "pre": (clip(dict(pre_norm=False)), "transformers", "model.image.pre_norm = False: CLIPModel has one"),
    "siglip pre": (siglip(dict(pre_norm=True)), "transformers", "model.image.pre_norm = True: SiglipModel has none"),
    "width": (clip(dict(width=24, embed_dim=None)), "open_clip", "model.image.embed_dim = None"),
    "eps": (
        Model(image=ImageTower.siglip("B/16", norm_eps=1e-5), text=TextTower.siglip("B", **TEXT)),
        *("open_clip", "model.image.norm_eps = 1e-05"),
    ),
}


@pytest.mark.parametrize(("model", "to", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_what_a_format_has_not(tmp_path, tokenizer, model, to, message):
    with pytest.raises(ConfigError, match=message):
        export(model, jax.eval_shape(lambda: init(model, 0)), tokenizer, "squash", tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_refuses_an_end_token_that_is_not_the_highest(tmp_path, tokenizer):
    words = json.loads(tokenizer.read_text())
    words["added_tokens"].append(words["added_tokens"][-1] | {"id": TEXT["vocab_size"], "content": "<extra>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ConfigError, match=r"its end token must have the highest id"):
        export(clip(), parameters(clip()), tmp_path / "tokenizer.json", "squash", tmp_path / "out", "open_clip")


def test_missing_torch_is_refused_with_the_remedy(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match=r"can't import open_clip .*: pip install torch "):
        load(tmp_path, "open_clip")
