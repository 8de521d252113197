"""Two-tower models of big_vision's as runs: embeddings and logits equal those of flax's layers, whatever the file's form."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

import clipjax
from clipjax import cli
from clipjax.config import SIZES, ConfigError, ImageTower, Model, TextTower
from clipjax.data.images.image import fit
from clipjax.export.compare.verify import encode
from clipjax.export.formats.big_vision_read import model_of, read
from clipjax.export.found import Options
from tests import torch_reference
from tests.export.standins_big_vision import IMAGE, TEXT, TwoTowers, draw, gemma, save, shapes, stacked, unigram

torch_reference.load()

SIDE, LENGTH = 32, 10


def old(params: dict) -> dict:
    """As until 2022: the class token has a position, and positions are the encoder's."""
    image = dict(params["img"])
    rows = image.pop("pos_embedding")
    first = np.float32(np.random.default_rng(1).standard_normal((1, 1, rows.shape[2])))
    image |= dict(cls=image["cls"] - first)
    image["Transformer"] = image["Transformer"] | dict(posembed_input=dict(pos_embedding=np.concatenate([first, rows], axis=1)))
    half = params["txt"]["pos_embedding"] / 2
    text = params["txt"] | dict(pos_embedding=half, Encoder_0=params["txt"]["Encoder_0"] | dict(pos_embedding=half))
    return params | dict(img=image, txt=text)


def half(params: dict) -> dict:
    return jax.tree.map(lambda x: np.float32(x.astype(jnp.bfloat16)), params)


OPTIMIZER = {"opt/0/img/embedding/kernel": np.ones(3), "extra": np.ones(2)}
FORMS = {  # name -> towers, what the file holds of the parameters, and how
    "SigLIP": (IMAGE, TEXT, True, stacked, {}),
    "SigLIP with its optimizer": (IMAGE, TEXT, True, lambda p: p, dict(root="params/", **OPTIMIZER)),
    "SigLIP g-opt": (IMAGE, TEXT | dict(width=16), True, lambda p: p | dict(img=stacked(p["img"])), {}),
    "LiT": (IMAGE | dict(pool="tok"), TEXT | dict(width=16), False, old, dict(root="opt/target/")),
    "class token": (IMAGE | dict(pool="tok", depth=11), TEXT, True, lambda p: p, {}),
    "mean of bfloat16": (IMAGE | dict(pool="gap"), TEXT | dict(out=None), True, half, dict(half=True)),
    "fixed positions and two heads": (IMAGE | dict(learned=False, out=20), TEXT | dict(out=20), True, stacked, {}),
}


@pytest.mark.parametrize(("image", "text", "bias", "edit", "how"), FORMS.values(), ids=FORMS.keys())
def test_equals_flax(tmp_path, image, text, bias, edit, how):
    theirs = TwoTowers(image, text, bias)
    params = draw(theirs, SIDE, LENGTH)
    file = save(edit(params), tmp_path / "model.npz", **how)
    size = SIDE if "learned" in image else None
    found = read(file, Options(unigram(tmp_path / "tokenizer.json"), size))
    assert (found.model.init_bias is None) != bias
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, SIDE, SIDE, 3)).astype(np.uint8)
    ids = rng.integers(0, TEXT["words"], (3, LENGTH))
    params = half(params) if "half" in how else params
    want = jax.jit(lambda p: theirs.apply({"params": p}, jnp.float32(pixels) / 127.5 - 1, ids))(params)
    got = encode(found.model, found.params, pixels, ids)
    for ours, flax in zip(got, want, strict=False):  # the logits are up to 130
        np.testing.assert_allclose(ours, flax, rtol=2e-6, atol=1e-5 if ours is not got.logits else 1e-3)


def file_of(folder: Path, image: dict = IMAGE, text: dict = TEXT, bias: bool = True, **params: object) -> Path:
    return save(draw(TwoTowers(image, text, bias), SIDE, LENGTH) | params, folder / "model.npz")


def test_a_workdir(tmp_path, capsys):
    """A run as others: float32, no clamp on the scale, SigLIP's texts and padding."""
    file, words = file_of(tmp_path), unigram(tmp_path / "tokenizer.json")
    command = ["import", "--from", "big_vision", str(file), "--tokenizer", str(words), "--out", str(tmp_path / "run")]
    assert cli.main(command) == 0
    assert "the tokenizer has 19 tokens, the text tower 99" in capsys.readouterr().out
    run = clipjax.load(tmp_path / "run")
    assert (run.run.model.dtype, run.run.model.max_scale, run.run.data.resize) == ("float32", None, "squash")
    assert run.run.tokenizer.clean == "canonicalize"
    np.testing.assert_allclose(np.exp(run.params["log_scale"]), 117.3, rtol=1e-6)
    np.testing.assert_array_equal(run.tokenizer.encode(["A Cat."])[0], [[3, 4, 1, 1, 1, 1, 1, 1, 1, 1]])
    with pytest.raises(ConfigError, match=r"--tokenizer = None: name the tokenizer of its 99 tokens, a SentencePiece model or"):
        read(file, Options())


@pytest.mark.parametrize(
    ("image", "bias", "options"),
    [
        (IMAGE, True, []),
        (IMAGE | dict(pool="tok"), False, ["--image-size", "47"]),  # positions are resized; a column of pixels is left over
        (IMAGE | dict(learned=False, pool="gap", out=24), True, ["--image-size", "32"]),
    ],
    ids=["SigLIP", "LiT", "fixed positions"],
)
def test_open_clips_own_reader_agrees(tmp_path, capsys, image, bias, options):
    """On images and captions, through the command."""
    file, words = file_of(tmp_path, image, bias=bias), unigram(tmp_path / "tokenizer.json")
    command = ["import", "--from", "big_vision", str(file), "--tokenizer", str(words), "--out", str(tmp_path / "run"), "--verify"]
    assert cli.main(command + options) == 0
    shown = capsys.readouterr().out
    assert "not judged: image files and strings: big_vision's own resizing" in shown
    figures = re.findall(r"same pixels and ids: image (\S+), text (\S+); logits (\S+)\n", shown)
    assert all(0 < float(figure) < 1e-5 for figure in figures[0])


def test_an_image_tower_alone(tmp_path, capsys):
    """A vision transformer, as the start of a LiT: no tokenizer, and its classifier is left out."""
    params = draw(TwoTowers(IMAGE | dict(pool="tok"), TEXT), SIDE, LENGTH)
    file = save(old(params)["img"] | dict(head=dict(kernel=np.ones((24, 5)), bias=np.ones(5))), tmp_path / "vit.npz")
    whole = read(save(params, tmp_path / "whole.npz"), Options(unigram(tmp_path / "tokenizer.json")))
    command = ["import", "--from", "big_vision", str(file), "--out", str(tmp_path / "run")]
    assert cli.main(command) == 0
    assert "not imported: a classifier (head)" in capsys.readouterr().out
    run = clipjax.load(tmp_path / "run")
    assert (run.run.model.towers, run.run.model.image) == ("image", whole.model.image)
    images = [Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))]
    pixels = np.stack([fit(image, SIDE, "squash") for image in images])
    want = encode(whole.model, whole.params, pixels, np.zeros((1, LENGTH), np.int32)).image
    np.testing.assert_allclose(run.encode_image(images), want, rtol=0, atol=1e-5)
    assert cli.main([*command[:-1], str(tmp_path / "other"), "--verify"]) == 2
    assert "open_clip's reader takes two towers" in capsys.readouterr().err


def test_tokenizers(tmp_path):
    """SigLIP 2's keeps punctuation and pads with a token of its own; LiT's keeps upper case; a start token is refused."""
    file, words = file_of(tmp_path), gemma(tmp_path / "gemma.json")
    tokens = read(file, Options(words)).tokenizer.encode(["Ca."])[0][0].tolist()
    assert tokens == [3, 16, 12, 1, *[0] * 6]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="GemmaTokenizer", padding_side="left")))
    assert read(file, Options(words)).tokenizer.encode(["Ca."])[0][0].tolist() == tokens  # transformers' files change nothing
    lit = read(file_of(tmp_path, bias=False), Options(unigram(tmp_path / "lit.json"))).tokenizer
    assert lit.encode(["A."])[0][0].tolist() == [6, 17, 15, *[1] * 7]
    with pytest.raises(ConfigError, match=r"gemma.json': puts a start token before a text"):
        read(file, Options(gemma(words, start="<eos>")))


def test_image_sizes(tmp_path):
    """Positions are resized as open_clip resizes them (tests/models/test_positions.py), and that is told."""
    words = Options(unigram(tmp_path / "tokenizer.json"))
    file = file_of(tmp_path, IMAGE | dict(pool="tok"))
    same, larger = read(file, words), read(file, words._replace(image_size=48))
    assert (same.model.image.image_size, larger.model.image.image_size) == (32, 48)
    assert "position embeddings: resized from 4 x 4 patches to 6 x 6" in larger.notes
    assert not any("resized from" in note for note in same.notes)
    rows = larger.params["image"]["positions"]
    assert rows.shape == (37, 24)
    assert not rows[0].any()  # the class token has no position
    np.testing.assert_allclose(rows[1:].mean(0), same.params["image"]["positions"][1:].mean(0), atol=0.02)


PUBLISHED = {  # size, patch, image size, size of the text tower, its length, words: SigLIP's and SigLIP 2's demos in big_vision
    "SigLIP B/16": ("B", 16, 224, "B", 64, 32_000),
    "SigLIP So400m/14": ("So400m", 14, 384, "So400m", 64, 32_000),
    "SigLIP So400m/14 at 224": ("So400m", 14, 224, "So400m", 16, 32_000),
    "SigLIP 2 B/32": ("B", 32, 256, "B", 64, 256_000),
    "SigLIP 2 g-opt/16": ("g-opt", 16, 384, "So400m", 64, 256_000),
}


@pytest.mark.parametrize(("size", "patch", "side", "text", "length", "words"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_shapes(size, patch, side, text, length, words):
    names = ("width", "depth", "mlp_dim", "heads")
    sizes = SIZES | {"g-opt": (1536, 40, 6144, 16)}  # models/vit.py `decode_variant`
    image, writing = (dict(zip(names, sizes[name], strict=True)) | dict(depth=2) for name in (size, text))
    theirs = TwoTowers(image | dict(patch=patch), writing | dict(words=words, out=image["width"]))
    tree = stacked(jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes(theirs, side, length)))
    found = {name: array.shape for name, array in flatten_dict(tree, sep="/").items()}
    notes = []
    fields = dict(image_size=side, patch_size=patch, pool="map", pre_norm=False, patch_bias=True, norm_eps=1e-6)
    half = (0.5, 0.5, 0.5)
    tower = ImageTower(**image, **fields, embed_dim=None, activation="gelu_tanh", mean=half, std=half)
    fields = dict(length=length, vocab_size=words, pool="last", causal=False, projection_bias=True, norm_eps=1e-6)
    reader = TextTower(**writing, **fields, embed_dim=image["width"], activation="gelu_tanh")
    assert model_of(found, None, notes) == Model(image=tower, text=reader, init_scale=10.0, init_bias=-10.0)
    told = ["image size: 384, as published; 27 x 27 patches also fit 378 to 391 (--image-size)"]
    assert notes == (told if (side, patch) == (384, 14) else [])


def change(file: Path, edit) -> None:
    arrays = dict(np.load(file))
    edit(arrays)
    np.savez(file, **arrays)


def rename(arrays: dict, old: str, new: str) -> None:
    for name in [name for name in arrays if name.startswith(old)]:
        arrays[name.replace(old, new, 1)] = arrays.pop(name)


LAYER = "img/Transformer/encoderblock_1/"
REFUSED = {
    "bert": (lambda a: rename(a, "txt/Encoder_0", "txt/BertEncoder_0"), "its text tower is BERT, as of LiT-B16B and LiT-L16L"),
    "tanh": (lambda a: a.update({"img/pre_logits/kernel": np.ones((24, 24))}), r"ends in a tanh layer \(rep_size\)"),
    "residual": (lambda a: a.update({"img/conv_root/kernel": np.ones(1)}), "begins with a residual network"),
    "naflex": (lambda a: a.update({"img/embedding/kernel": np.ones((192, 24))}), "is NaFlex's, for images of any shape"),
    "no image": (lambda a: rename(a, "img/", "image/"), "has no img/embedding/kernel: it is no model that big_vision saved"),
    "no model": (lambda a: a.clear(), "has no img/embedding/kernel"),
    "no square": (lambda a: a.update({"img/pos_embedding": np.ones((1, 15, 24))}), "img/pos_embedding = 15: must be a square"),
    "no positions": (lambda a: a.pop("img/pos_embedding"), "--image-size = None: give it: fixed positions"),
    "oblong": (lambda a: a.update({"img/embedding/kernel": np.ones((8, 4, 3, 24))}), "has square patches"),
    "a layer": (lambda a: [a.pop(name) for name in list(a) if name.startswith(LAYER.replace("1", "0"))], "are not all there"),
    "a name": (
        lambda a: a.pop("img/Transformer/encoder_norm/scale"),
        "missing from the weights: img/Transformer/encoder_norm/sca",
    ),
    "a text": (lambda a: a.pop("txt/Embed_0/embedding"), "txt/Embed_0/embedding': is missing: this is not a whole"),
    "a shape": (lambda a: a.update({"txt/head/kernel": np.ones((23, 24))}), "another shape than the model's: txt/head/kernel"),
    "widths": (
        lambda a: a.update({"txt/head/kernel": np.ones((24, 20))}),
        "model.text.embed_dim = 20: must equal the image tower's",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_what_clipjax_has_not(tmp_path, spoil, message):
    file = file_of(tmp_path)
    change(file, spoil)
    with pytest.raises(ConfigError, match=message) as told:
        read(file, Options(unigram(tmp_path / "tokenizer.json")))
    assert len(str(told.value)) < 400


def test_refuses_other_files(tmp_path):
    file = file_of(tmp_path)
    file.write_bytes(file.read_bytes()[:5000])
    (tmp_path / "pickled.npz").touch()
    np.savez(tmp_path / "pickled.npz", **{"img/embedding/kernel": np.array([{}], object)}, allow_pickle=True)
    for name in ("model.npz", "none.npz", "pickled.npz"):
        with pytest.raises(ConfigError, match=f"{name}': is not a complete .npz"):
            read(tmp_path / name, Options())
