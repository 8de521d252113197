"""Position embeddings for another image size or text length: what a trained tower's become."""

import math

import numpy as np

from clipjax.config import require

CUBIC = -0.5  # Keys' parameter, as torch has it with antialias (without: -0.75)


def resized_image(positions: np.ndarray, class_token: bool, side: int) -> np.ndarray:
    """Image positions for `side` x `side` patches: bicubic with antialias, as open_clip and timm do (torch's F.interpolate with
    mode="bicubic", antialias=True, align_corners=False). A class token's row comes first and stays as it is.

    positions: [n, width], row by row over a square grid; returns float32 [side * side (+ 1), width].
    """
    first, grid = positions[: int(class_token)], positions[int(class_token) :]
    old = math.isqrt(len(grid))
    require(old > 0 and old * old == len(grid), "model.image", f"{len(grid)} positions", "are no square: they can't be resized")
    if old == side:
        return np.asarray(positions, np.float32)
    weights = _cubic(old, side)
    grid = np.asarray(grid, np.float64).reshape(old, old, -1)
    grid = np.einsum("ih,jw,hwd->ijd", weights, weights, grid, optimize=True).reshape(side * side, -1)
    return np.concatenate([first, grid]).astype(np.float32)


def resized_text(positions: np.ndarray, length: int, class_token: bool) -> np.ndarray:
    """Text positions for `length` tokens: the first ones if that is fewer, so that every position keeps its meaning; linear
    between the old ones if more (open_clip's resize_text_pos_embed). A class token's row comes last and stays as it is.

    positions: [t (+ 1), width]; returns float32 [length (+ 1), width].
    """
    old = len(positions) - int(class_token)
    tokens, last = positions[:old], positions[old:]
    if length < old:
        tokens = tokens[:length]
    elif length > old:
        tokens = _linear(old, length) @ np.asarray(tokens, np.float64)
    return np.concatenate([tokens, last]).astype(np.float32)


def _cubic(old: int, new: int) -> np.ndarray:
    """The weights of `old` values in each of `new` ones, [new, old]. When it shrinks, the filter is as much wider; where it
    reaches over the edge, what is left counts as all.
    """
    scale = old / new
    wide = max(scale, 1.0)
    centre = (np.arange(new) + 0.5) * scale
    away = np.abs(np.arange(old) + 0.5 - centre[:, None]) / wide
    near = ((CUBIC + 2) * away - (CUBIC + 3)) * away * away + 1
    far = CUBIC * (((away - 5) * away + 8) * away - 4)
    weights = np.where(away < 1, near, np.where(away < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def _linear(old: int, new: int) -> np.ndarray:
    """The weights of `old` values in each of `new` ones, [new, old]; in float32, as torch computes them."""
    at = np.clip((np.arange(new, dtype=np.float32) + np.float32(0.5)) * np.float32(old / new) - np.float32(0.5), 0, old - 1)
    return np.maximum(0.0, 1 - np.abs(np.arange(old) - at[:, None]))
