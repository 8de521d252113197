"""Our towers against transformers' CLIPModel and SiglipModel and open_clip's CLIP: random weights, mapped by the tables."""

import jax
import numpy as np
import pytest

from clipjax.config import ImageTower, Model, TextTower
from clipjax.export.formats import open_clip as native
from clipjax.export.formats import transformers as hf
from clipjax.export.formats.table import to_ours, to_theirs
from clipjax.models.clip import bind, init
from tests import torch_reference

torch_reference.load()
import open_clip  # noqa: E402
import torch  # noqa: E402
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel  # noqa: E402

pytestmark = pytest.mark.optimized

SPECIAL = dict(bos=1, eos=96, pad=0)


def clip(activation="gelu", image=None, text=None, **model) -> Model:
    """CLIP's ViT-B/16 scaled down: heads of 16, odd numbers of patches and tokens."""
    sizes = dict(image_size=40, patch_size=8, width=48, depth=3, heads=3, mlp_dim=144, embed_dim=24)
    words = dict(length=11, vocab_size=97, width=32, depth=2, heads=2, mlp_dim=128, embed_dim=24)
    image_tower = ImageTower(**dict(sizes, activation=activation) | (image or {}))
    return Model(image=image_tower, text=TextTower(**dict(words, activation=activation) | (text or {})), dtype="float32", **model)


def siglip(activation="gelu", image=None, text=None, **model) -> Model:
    """SigLIP's So400m/14 scaled down: an MLP that is no multiple of the width."""
    tower = dict(width=48, depth=3, heads=3, mlp_dim=179, activation=activation)
    image_tower = ImageTower.siglip("B/16", **tower | dict(image_size=42, patch_size=14) | (image or {}))
    words = TextTower.siglip("B", **tower | dict(length=9, vocab_size=97, embed_dim=48) | (text or {}))
    return Model(image=image_tower, text=words, **dict(init_bias=-10.0, dtype="float32") | model)


def randomise(module: torch.nn.Module, seed: int = 0) -> dict[str, np.ndarray]:
    """Every parameter drawn afresh, gains near 1, so that none is a zero or a one that hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            centre = 1.0 if parameter.ndim == 1 and parameter.mean() == 1 else 0.0
            parameter.copy_(centre + scale * torch.randn(parameter.shape, generator=generator))
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def inputs(model: Model, n: int = 5) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """Images, the same normalised for torch, and captions from the shortest to the longest that fit."""
    rng = np.random.default_rng(0)
    size = model.image.image_size
    images = rng.integers(0, 256, (n, size, size, 3), np.uint8)
    pixels = ((images / 255 - np.array(model.image.mean)) / np.array(model.image.std)).astype(np.float32)
    tokens = np.zeros((n, model.text.length), np.int32)
    for i, length in enumerate(np.linspace(2, model.text.length, n).astype(int)):
        tokens[i, :length] = [SPECIAL["bos"], *rng.integers(2, SPECIAL["eos"], length - 2), SPECIAL["eos"]]
    return images, torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), tokens


def ours(model: Model, params: dict, images: np.ndarray, tokens: np.ndarray) -> list[np.ndarray]:
    m = bind(model, params)
    image, text = jax.jit(lambda i, t: (m.encode_image(i), m.encode_text(t)))(images, tokens)
    logits = np.exp(m.log_scale[...]) * image @ text.T + (0 if m.bias is None else m.bias[...])
    return [np.asarray(x) for x in (image, text, logits)]


def assert_close(got, want, tolerance=1e-5):
    """Within the tolerance of the largest entry."""
    for name, g, w in zip(("image", "text", "logits"), got, want, strict=True):
        w = w.detach().numpy()
        np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * np.abs(w).max(), err_msg=name)


def shapes(model: Model) -> dict:
    return jax.eval_shape(lambda: init(model, 0))


MODELS = {
    "clip": clip(),
    "clip quick_gelu": clip("quick_gelu"),
    "clip gelu_tanh": clip("gelu_tanh"),
    "clip eps": clip(image=dict(norm_eps=1e-3), text=dict(norm_eps=1e-4)),
    "clip mixed": clip(image=dict(activation="gelu_tanh", depth=2), text=dict(activation="quick_gelu", depth=4, mlp_dim=50)),
    "clip of a size that is no multiple of the patch": clip(image=dict(image_size=45)),
    "siglip": siglip(),
    "siglip gelu_tanh": siglip("gelu_tanh"),
    "siglip quick_gelu": siglip("quick_gelu", image=dict(image_size=41, heads=2), text=dict(width=36, heads=4)),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_transformers(model):
    hf.refuse(model)
    kind, theirs = (SiglipConfig, SiglipModel) if model.image.pool == "map" else (CLIPConfig, CLIPModel)
    reference = theirs(kind(**hf.configs(model, SPECIAL, "squash")["config.json"])).eval()
    weights = randomise(reference)
    params = to_ours(hf.table(model), weights, shapes(model))
    images, pixels, tokens = inputs(model)
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        out = reference(input_ids=ids, pixel_values=pixels)
        masked = reference(input_ids=ids, pixel_values=pixels, attention_mask=(ids != 0).long())
    assert_close(ours(model, params, images, tokens), (out.image_embeds, out.text_embeds, out.logits_per_image))
    if theirs is CLIPModel:  # the mask that a tokenizer adds hides nothing from the end token that is not hidden already
        torch.testing.assert_close(masked.text_embeds, out.text_embeds, rtol=0, atol=1e-6)
    back = to_theirs(hf.table(model), params)
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[name], weights[name]) for name in weights)


NATIVE = {name: model for name, model in MODELS.items() if model.image.pool == "cls" and name != "clip mixed"} | {
    "clip activations differ": clip(image=dict(activation="gelu_tanh", mlp_dim=59), text=dict(mlp_dim=43)),
    "clip no pre-norm": clip(image=dict(pre_norm=False)),
    "clip's patches averaged, and another end": clip(image=dict(pool="avg"), text=dict(pool="eos", eos_id=96)),
    "CLIPA": clip(image=dict(pool="avg", norm_pooled=True, pre_norm=False), text=dict(causal=False, pool="last")),
    "clip with siglip's text and bias": clip(text=dict(causal=False, pool="last", projection_bias=True), init_bias=-10.0),
    "clip unprojected text": clip(text=dict(width=24, heads=3, embed_dim=None)),
}


@pytest.mark.parametrize("model", NATIVE.values(), ids=NATIVE.keys())
def test_open_clip(model):
    native.refuse(model)
    config = native.configs(model, SPECIAL, "squash")["open_clip_config.json"]["model_cfg"]
    reference = open_clip.CLIP(**config).eval()
    weights = randomise(reference)
    params = to_ours(native.table(model), weights, shapes(model))
    images, pixels, tokens = inputs(model)
    with torch.no_grad():
        image, text, scale, *bias = reference(pixels, torch.from_numpy(tokens).long())
        logits = scale * image @ text.T + sum(bias)
    assert_close(ours(model, params, images, tokens), (image, text, logits))
    back = to_theirs(native.table(model), params)
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[name], weights[name]) for name in weights)
