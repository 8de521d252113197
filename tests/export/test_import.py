"""Folders of open_clip's as runs: an export is imported bit for bit, and a model that clipjax has not is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import clipjax
from clipjax import cli
from clipjax.config import ConfigError, ImageTower
from clipjax.data.images.image import fit
from clipjax.export.compare.verify import encode
from clipjax.export.folder import export
from clipjax.export.formats import open_clip as layout
from clipjax.export.formats.open_clip import WEIGHTS
from clipjax.export.formats.open_clip_config import model_of
from clipjax.export.formats.open_clip_read import CONFIG
from clipjax.export.formats.table import flatten
from clipjax.export.imported import import_run
from clipjax.models.clip import init
from tests import torch_reference
from tests.export.models import CAPTIONS, LENGTH, clip, coca, parameters

torch_reference.load()
import open_clip  # noqa: E402
import torch  # noqa: E402

GO_ON = """from pathlib import Path
from clipjax.config import from_json
def config():
    return from_json(Path("{json}").read_text())
"""
MODELS = {"clip": (clip(dict(mean=(0.5, 0.4, 0.3)), dict(norm_eps=1e-6)), "crop"), "coca": (coca(init_bias=-10.0), "squash")}


@pytest.mark.parametrize(("model", "resize"), MODELS.values(), ids=MODELS.keys())
def test_there_and_back(tmp_path, tokenizer, capsys, model, resize):
    params = parameters(model)
    export(model, params, tokenizer, resize, tmp_path / "out", "open_clip", clean="web")  # as open_clip does by itself
    assert cli.main(["import", "--from", "open_clip", str(tmp_path / "out"), "--out", str(tmp_path / "run")]) == 0
    assert "step 0" in capsys.readouterr().out
    run = clipjax.load(tmp_path / "run")
    scale = None if model.init_bias is not None else 100.0
    assert run.run.model == replace(model, dtype="float32", max_scale=scale)
    assert run.run.data.resize == resize
    want, got = (dict(flatten(tree)) for tree in (params, run.params))
    assert want.keys() == got.keys()
    for path in want:
        np.testing.assert_array_equal(got[path], want[path], err_msg=path)
    assert cli.main(["export", str(tmp_path / "run"), "--to", "open_clip", "--out", str(tmp_path / "again")]) == 0
    for file in (tmp_path / "out").iterdir():
        if file.name != WEIGHTS:  # compared above; the order in their header may change
            assert (tmp_path / "again" / file.name).read_text() == file.read_text(), file.name
    before = sorted((tmp_path / "run").rglob("*"))
    (tmp_path / "config.py").write_text(GO_ON.format(json=str(tmp_path / "run" / "config.json")))
    assert cli.main(["train", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "run")]) == 2
    assert "holds weights only, no state of training: choose a new --workdir" in capsys.readouterr().err
    assert cli.main(["import", "--from", "open_clip", str(tmp_path / "out"), "--out", str(tmp_path / "run")]) == 2
    assert "is not empty: name a new folder" in capsys.readouterr().err
    assert sorted((tmp_path / "run").rglob("*")) == before


def write(folder: Path, cfg: dict, theirs: torch.nn.Module, words: Path) -> Path:
    """As open_clip's `save_for_hf` writes it: only the fields that its author gave, and another name for the weights."""
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(dict(model_cfg=cfg, preprocess_cfg=dict(resize_mode="squash"))))
    weights = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    safetensors.numpy.save_file(weights, folder / "open_clip_pytorch_model.safetensors")
    shutil.copy(words, folder / "tokenizer.json")
    return folder


VISION = dict(image_size=32, layers=2, width=48, head_width=16, patch_size=8)
WORDS = dict(context_length=LENGTH, vocab_size=400, width=32, heads=2, layers=2)
THEIRS = {
    "CLIP": (open_clip.CLIP, dict(embed_dim=24, quick_gelu=True, vision_cfg=VISION, text_cfg=WORDS)),
    "CustomTextCLIP": (open_clip.CustomTextCLIP, dict(embed_dim=24, vision_cfg=VISION, text_cfg=WORDS)),
    "CoCa": (
        open_clip.CoCa,
        dict(
            embed_dim=32,
            vision_cfg=VISION | dict(attentional_pool=True, attn_pooler_heads=8, attn_pooler_queries=5, output_tokens=True),
            text_cfg=WORDS | dict(embed_cls=True, output_tokens=True),
            multimodal_cfg=WORDS | dict(layers=1, attn_pooler_heads=8, mlp_ratio=2),
        ),
    ),
}


@pytest.mark.parametrize(("kind", "cfg"), THEIRS.values(), ids=THEIRS.keys())
def test_a_folder_that_open_clip_wrote(tmp_path, tokenizer, images, kind, cfg):
    """open_clip's defaults hold for missing fields, and it ignores the `mlp_ratio` of a decoder."""
    torch.manual_seed(0)
    theirs = kind(**cfg).eval()
    if kind is open_clip.CoCa:  # open_clip leaves it as the memory was, at times infinite
        torch.nn.init.normal_(theirs.text_decoder.text_projection, std=0.2)
    folder = write(tmp_path / "theirs", cfg, theirs, tokenizer)
    run, notes = import_run(folder, tmp_path / "run", "open_clip")
    assert notes == []
    loaded = clipjax.load(tmp_path / "run")
    pixels = np.stack([fit(image, 32, "squash") for image in images])
    tokens = loaded.tokenizer.encode(CAPTIONS)[0]
    if kind is open_clip.CLIP:
        found = loaded.encode_text(CAPTIONS)  # as `clipjax embed` and the evaluations do
        assert (found * encode(run.model, loaded.params, pixels, tokens).text).sum(1).min() > 0.999  # bfloat16
    ours = encode(run.model, loaded.params, pixels, tokens)
    mean, std = np.float32(run.model.image.mean), np.float32(run.model.image.std)
    normalised = torch.from_numpy(((np.float32(pixels) / 255 - mean) / std).transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        ids = torch.from_numpy(tokens).long()
        image, text = theirs.encode_image(normalised, normalize=True), theirs.encode_text(ids, normalize=True)
        np.testing.assert_allclose(ours.image, image.numpy(), rtol=0, atol=1e-5)
        np.testing.assert_allclose(ours.text, text.numpy(), rtol=0, atol=1e-5)
        if run.model.decoder is not None:
            words = theirs(normalised, ids)["logits"].numpy()
            np.testing.assert_allclose(ours.token_logits, words, rtol=0, atol=1e-5 * np.abs(words).max())


PUBLISHED = (
    *("ViT-B-32-quickgelu", "ViT-H-14", "coca_ViT-B-32", "coca_ViT-L-14", "ViT-B-16-SigLIP", "ViT-SO400M-14-SigLIP-384"),
    *("ViT-gopt-16-SigLIP2-256", "ViT-L-14-CLIPA-336", "ViT-L-14-worldwide"),
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    """Every tensor of open_clip's has its place, in the same shape."""
    cfg = open_clip.get_model_config(name)
    kind = open_clip.CLIP if not cfg.pop("custom_text", False) else open_clip.CustomTextCLIP
    model = model_of(cfg, ImageTower.mean, ImageTower.std)
    with torch.device("meta"):
        theirs = (open_clip.CoCa if "multimodal_cfg" in cfg else kind)(**cfg)
    layout.refuse(model)
    ours = jax.eval_shape(lambda: init(model, 0))
    sizes = dict(flatten(jax.tree.map(lambda x: x.size, ours)))
    tensors = {name: tensor.numel() for name, tensor in theirs.state_dict().items()}
    names, total = set(), 0
    for row in layout.table(model).rows:
        layers = dict(flatten(ours))[row.ours[0][0]].shape[0] if row.layered else 1
        names |= {name for group in row.names(layers) for name in group}
        size = sum(tensors[name] for group in row.names(layers) for name in group)
        assert size == sum(sizes[path] for path, _ in row.ours), row
        total += size
    assert names == tensors.keys()
    assert total == sum(sizes.values())


def change(folder: Path, part: str, **fields: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    section = config if part == "" else config[part] if part.startswith("pre") else config["model_cfg"].setdefault(part, {})
    section.update(fields)
    (folder / CONFIG).write_text(json.dumps(config))


REFUSED = {
    "layer scale": (lambda f: change(f, "vision_cfg", ls_init_value=0.1), r"vision_cfg.ls_init_value = 0.1: clipjax has nothing"),
    "resnet": (
        lambda f: change(f, "vision_cfg", layers=[3, 4, 6, 3]),
        r"vision_cfg.layers = \[3, 4, 6, 3\]: .*vision transformers",
    ),
    "no pooler": (lambda f: change(f, "vision_cfg", pool_type="none"), "vision_cfg.pool_type = 'none'"),
    "cascade": (lambda f: change(f, "vision_cfg", attentional_pool="cascade"), "attentional_pool = 'cascade'"),
    "timm": (
        lambda f: change(f, "vision_cfg", timm_model_name="convnext_base"),
        "timm_model_name = 'convnext_base': .*siglip_224",
    ),
    "hf": (lambda f: change(f, "text_cfg", hf_model_name="roberta-base"), "text_cfg.hf_model_name = 'roberta-base'"),
    "first": (lambda f: change(f, "text_cfg", pool_type="first"), "text_cfg.pool_type = 'first'"),
    "other end": (lambda f: change(f, "text_cfg", pool_type="eos", eos_id=2), "the id 2; its tokenizer's end token: 3"),
    "padding": (lambda f: change(f, "text_cfg", embed_cls=True, pad_id=1), "text_cfg.pad_id = 1"),
    "activation": (lambda f: change(f, "text_cfg", act_kwargs=dict(inplace=True)), "text_cfg.act_kwargs = {'inplace': True}"),
    "longest": (lambda f: change(f, "preprocess_cfg", resize_mode="longest"), "resize_mode = 'longest'"),
    "nearest": (lambda f: change(f, "preprocess_cfg", interpolation="nearest"), "interpolation = 'nearest'"),
    "no model": (lambda f: (f / CONFIG).write_text("{}"), "is not a configuration of open_clip"),
    "no config": (lambda f: (f / CONFIG).unlink(), "has no open_clip_config.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer: .*says in-this-folder: .*--tokenizer"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no weights as open_clip_model.safetensors"),
    "pickled": (
        lambda f: (f / WEIGHTS).rename(f / "open_clip_pytorch_model.bin"),
        "open_clip_pytorch_model.bin.*can't read it with weights_only=True",
    ),
    "torn": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:999]), "is not a complete safetensors file"),
    "other width": (
        lambda f: change(f, "text_cfg", vocab_size=401),
        r"of another shape than the model's: token_embedding.weight",
    ),
    "too few words": (lambda f: change(f, "text_cfg", vocab_size=30), "its weights have 30 tokens, and its tokenizer 3"),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_what_clipjax_has_not(tmp_path, tokenizer, spoil, message):
    model = clip()
    export(model, parameters(model), tokenizer, "crop", tmp_path / "src", "open_clip")
    spoil(tmp_path / "src")
    with pytest.raises(ConfigError, match=message):
        import_run(tmp_path / "src", tmp_path / "run", "open_clip")
    assert not (tmp_path / "run").exists()


def test_cleaning_comes_along(tmp_path, tokenizer):
    """As SigLIP's, in open_clip's configuration of it."""
    model = clip()
    export(model, parameters(model), tokenizer, "crop", tmp_path / "src", "open_clip")
    change(tmp_path / "src", "text_cfg", tokenizer_kwargs=dict(clean="canonicalize"))
    run, notes = import_run(tmp_path / "src", tmp_path / "run", "open_clip")
    assert (run.tokenizer.clean, notes) == ("canonicalize", [])
    one, other = clipjax.load(str(tmp_path / "run")).encode_text(["A Red, red heart.", "a red red heart"])
    np.testing.assert_array_equal(one, other)
