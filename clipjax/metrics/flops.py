"""The model's FLOPs, counted by hand, and what share of the chips' they are."""

from collections.abc import Collection, Sequence

import jax

from clipjax.chips import chip_of
from clipjax.config import ImageTower, Model, TextTower


def model_flops(model: Model, trained: Collection[str] | None = None, captions: int = 1) -> float:
    """FLOPs of a training step per pair, 2 a multiply-add: 3 times the forward pass of a tower whose blocks are trained, 2 times
    where the gradient only passes through them, once where nothing below the head is. `trained`: paths of the parameters that
    are, as `image/blocks/mlp/up/kernel`; None: all. `captions`: texts a pair has.

    Dot products only, once each whatever is made again in the backward pass. Causal attention counts in full, as it is computed
    and as others count it. Left out: the poolers' queries, once a batch, and the loss, 8 B d a pair (below 1 % of B/16's
    step up to B = 256k).
    """
    return sum(tower_flops(model, trained, captions).values())


def tower_flops(model: Model, trained: Collection[str] | None = None, captions: int = 1) -> dict[str, float]:
    """`model_flops` of the towers by themselves, `image` and `text`, and of a `decoder` with what it foresees words by."""
    forward = {"image": _image_flops(model.image), "text": captions * _text_flops(model.text)}
    if model.decoder is not None:
        forward["decoder"] = captions * _decoder_flops(model)
    passes = {tower: 3 if trained is None else _passes(tower, trained) for tower in forward}
    return {tower: float(passes[tower] * forward[tower]) for tower in forward}


def _passes(tower: str, trained: Collection[str]) -> int:
    parts = {name.split("/")[1] for name in trained if name.startswith(tower + "/")}
    if "blocks" in parts:
        return 3
    return 2 if parts - {"norm", "map", "pooler", "contrastive", "projection", "output"} else 1


def _image_flops(c: ImageTower) -> float:
    kept = max(1, round(c.patches * (1 - c.patch_dropout)))
    tokens, e = kept + c.class_token, c.embed_dim or 0
    patch = 2 * c.patches * 3 * c.patch_size**2 * c.width  # of all patches: they are dropped afterwards
    flops = patch + _blocks_flops(c, tokens) + 2 * (e if c.attentional else c.width) * e
    if c.pool == "map":
        flops += _sees(1, tokens, c.width, c.width) + 2 * c.width**2 + 2 * 2 * c.width * c.mlp_dim
    if c.attentional:
        flops += _sees(c.queries, tokens, c.width, e) + 2 * c.queries * e**2
    if c.pool in ("cascade", "parallel"):
        flops += (_sees(1, c.queries, e, e) if c.pool == "cascade" else _sees(1, tokens, c.width, e)) + 2 * e**2
    return flops


def _sees(queries: int, tokens: int, context: int, width: int) -> float:
    """Keys and values of tokens, scores and weighted values: attention without its query and output."""
    return 2 * tokens * context * 2 * width + 2 * 2 * queries * tokens * width


def _text_flops(c: TextTower) -> float:
    return _blocks_flops(c, c.positions) + 2 * c.width * (c.embed_dim or 0)


def _decoder_flops(model: Model) -> float:
    c, d, tokens, (seen, width) = model.decoder, model.text.width, model.text.length - 1, model.image.context
    own = 2 * 4 * d**2 + 2 * 2 * tokens * d + c.mlps * 2 * 2 * d * c.mlp_dim  # a token: self-attention and MLPs
    return c.depth * (tokens * (own + 2 * 2 * d**2) + _sees(tokens, seen, width, d)) + 2 * tokens * d * model.text.vocab_size


def _blocks_flops(c: ImageTower | TextTower, tokens: int) -> float:
    linear = 2 * (3 * c.width**2 + c.width**2 + 2 * c.width * c.mlp_dim)  # a token: q, k, v; out; up and down
    attention = 2 * 2 * tokens * c.width  # a token: scores and weighted values
    return c.depth * tokens * (linear + attention)


def peak_flops(kind: str) -> float | None:
    """Dense bf16 FLOP/s of one JAX device of this `device_kind`; None where it is not known, as for CPUs and slices of a GPU."""
    chip = chip_of(kind)
    return None if chip is None else chip.flops / chip.devices


def mfu(flops_per_second: float, devices: Sequence[jax.Device]) -> float | None:
    """Model-FLOPs utilisation, 0 to 1: FLOPs the model needs against the bf16 peak of `devices`. None where that is not known."""
    peak = peak_flops(devices[0].device_kind)
    return None if peak is None else flops_per_second / (peak * len(devices))
