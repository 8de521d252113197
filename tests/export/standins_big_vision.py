"""A model of big_vision's as its equations say (google-research/big_vision models/vit.py, models/proj/image_text), and its .npz.

The layers are flax.linen's, as there, so their names and their arithmetic are the real ones: LayerNorm with epsilon 1e-6, GELU by
tanh. Weights are random, biases and scales too.
"""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax.traverse_util import flatten_dict
from tokenizers import models, pre_tokenizers, processors

IMAGE = dict(width=24, depth=2, heads=3, mlp_dim=40, patch=8)
TEXT = dict(width=24, depth=2, heads=2, mlp_dim=56, words=99, out=24)


class MlpBlock(nn.Module):
    mlp_dim: int

    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(self.mlp_dim)(x))  # first, so that it is Dense_0
        return nn.Dense(x.shape[-1])(hidden)


class Encoder1DBlock(nn.Module):
    heads: int
    mlp_dim: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(y, y)
        y = nn.LayerNorm()(x)
        return x + MlpBlock(self.mlp_dim)(y)


class Encoder(nn.Module):
    depth: int
    heads: int
    mlp_dim: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.depth):
            x = Encoder1DBlock(self.heads, self.mlp_dim, name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class MAPHead(nn.Module):
    heads: int
    mlp_dim: int

    @nn.compact
    def __call__(self, x):
        probe = self.param("probe", nn.initializers.normal(), (1, 1, x.shape[-1]))
        x = nn.MultiHeadDotProductAttention(num_heads=self.heads)(jnp.tile(probe, (len(x), 1, 1)), x)
        y = nn.LayerNorm()(x)
        return (x + MlpBlock(self.mlp_dim)(y))[:, 0]


class Image(nn.Module):
    width: int
    depth: int
    heads: int
    mlp_dim: int
    patch: int = 8
    pool: str = "map"  # gap, tok
    learned: bool = True
    out: int | None = None

    @nn.compact
    def __call__(self, pixels):
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, strides=size, padding="VALID", name="embedding")(pixels)
        n, h, w, d = x.shape
        x = x.reshape(n, h * w, d)
        x = x + (self.param("pos_embedding", nn.initializers.normal(), (1, h * w, d)) if self.learned else waves(h, w, d))
        if self.pool == "tok":
            token = self.param("cls", nn.initializers.normal(), (1, 1, d))
            x = jnp.concatenate([jnp.tile(token, (n, 1, 1)), x], axis=1)
        x = Encoder(self.depth, self.heads, self.mlp_dim, name="Transformer")(x)
        x = MAPHead(self.heads, self.mlp_dim)(x) if self.pool == "map" else x.mean(1) if self.pool == "gap" else x[:, 0]
        return x if self.out is None else nn.Dense(self.out, name="head")(x)


class Text(nn.Module):
    width: int
    depth: int
    heads: int
    mlp_dim: int
    words: int
    out: int | None

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(self.words, self.width)(ids)
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, *x.shape[1:]))
        x = Encoder(self.depth, self.heads, self.mlp_dim)(x)[:, -1]
        return x if self.out is None else nn.Dense(self.out, name="head")(x)


class TwoTowers(nn.Module):
    """`image`, `text`: the fields of the towers. `bias`: whether it has a logit bias."""

    image: Any
    text: Any
    bias: bool = True

    @nn.compact
    def __call__(self, pixels, ids):
        """Unit vectors of both, [n, e], and logits [n, n]."""
        image, text = Image(**self.image, name="img")(pixels), Text(**self.text, name="txt")(ids)
        image, text = (z / (jnp.linalg.norm(z, axis=1, keepdims=True) + 1e-8) for z in (image, text))
        logits = image @ text.T * jnp.exp(self.param("t", nn.initializers.zeros, (1,))[0])
        return image, text, logits + self.param("b", nn.initializers.zeros, (1,))[0] if self.bias else logits


def waves(h: int, w: int, d: int) -> np.ndarray:
    """Fixed positions, MoCo v3's: sines and cosines of x, then of y."""
    y, x = (a.reshape(-1, 1) for a in np.mgrid[:h, :w])
    omega = 1 / 10_000 ** (np.arange(d // 4) / (d // 4 - 1))
    return np.concatenate([f(a * omega) for a in (x, y) for f in (np.sin, np.cos)], axis=1)[None].astype(np.float32)


def shapes(model: TwoTowers, size: int, length: int) -> dict[str, Any]:
    """The parameters' shapes, nested. `size`: of an image, pixels; `length`: of a text, tokens."""
    inputs = jnp.zeros((1, size, size, 3)), jnp.zeros((1, length), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def draw(model: TwoTowers, size: int, length: int) -> dict[str, Any]:
    """Random parameters, nested."""
    rng = np.random.default_rng(0)

    def leaf(path: Any, shape: Any) -> np.ndarray:
        name = path[-1].key
        if name in ("t", "b"):
            return np.float32([{"t": np.log(117.3), "b": -12.9}[name]])
        std = 0.3 if name in ("kernel", "pos_embedding", "embedding", "cls", "probe") else 0.1
        return np.float32((name == "scale") + std * rng.standard_normal(shape.shape))

    return jax.tree_util.tree_map_with_path(leaf, shapes(model, size, length))


def stacked(tower: dict[str, Any]) -> dict[str, Any]:
    """A tower's encoder as `scan=True` stores it: all layers in one, with a leading axis."""
    layers = [name for name in tower if name.startswith("encoderblock_")]
    if not layers:
        return {name: stacked(part) if isinstance(part, dict) else part for name, part in tower.items()}
    layers.sort(key=lambda name: int(name.rpartition("_")[2]))
    joint = jax.tree.map(lambda *parts: np.stack(parts), *(tower[name] for name in layers))
    return {name: part for name, part in tower.items() if name not in layers} | {"encoderblock": joint}


def save(params: dict[str, Any], file: Path, root: str = "", half: bool = False, **others: np.ndarray) -> Path:
    """Writes a .npz. `root`: what stands before each name; `half`: in bfloat16, which NumPy stores as bytes without a type;
    `others`: more arrays, such as the optimizer's."""
    arrays = {root + name: np.asarray(array) for name, array in flatten_dict(params, sep="/").items()}
    if half:
        arrays = {name: array.astype(jnp.bfloat16).view("V2") for name, array in arrays.items()}
    np.savez(file, **arrays, **others)
    return file


def unigram(file: Path) -> Path:
    """A tokenizer as SigLIP's: SentencePiece's unigrams, with the end token after a text and none before it."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -2.0), ("▁cat", -3.0), ("▁red", -3.0), ("▁", -4.0)]
    words += [(letter, -5.0) for letter in "acdehort.!AC"]
    backend = tokenizers.Tokenizer(models.Unigram(words, unk_id=2))
    return _save(backend, "</s>", file)


def gemma(file: Path, start: str = "") -> Path:
    """A tokenizer as SigLIP 2's: BPE, padding of its own, no start token."""
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *"▁acdehort.!AC", "ca"])}
    backend = tokenizers.Tokenizer(models.BPE(words, [("c", "a")], unk_token="<unk>"))
    backend.enable_padding(pad_id=0, pad_token="<pad>")
    return _save(backend, "<eos>", file, start)


def _save(backend: tokenizers.Tokenizer, end: str, file: Path, start: str = "") -> Path:
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}".strip(), special_tokens=[(end, 1)])
    backend.save(str(file))
    return file
