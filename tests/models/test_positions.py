"""Resized position embeddings against torch's interpolation, open_clip's and timm's functions."""

from types import SimpleNamespace

import numpy as np
import pytest

from clipjax.config import ConfigError
from clipjax.models.positions import resized_image, resized_text
from tests import torch_reference

torch_reference.load()
import torch  # noqa: E402
from open_clip.model import resize_pos_embed, resize_text_pos_embed  # noqa: E402
from timm.layers.pos_embed import resample_abs_pos_embed  # noqa: E402


def some(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def model(side: int = 1, length: int = 1, width: int = 6):
    """What open_clip's functions ask of a model."""
    return SimpleNamespace(visual=SimpleNamespace(grid_size=(side, side)), positional_embedding=some(length, width))


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (14, 16), (24, 27), (27, 9), (16, 3), (1, 3), (3, 1), (5, 5)])
def test_image_positions_equal_open_clips_and_timms(old, new):
    positions = some(old * old + 1, 6)
    state = {"visual.positional_embedding": torch.from_numpy(positions)}
    resize_pos_embed(state, model(new))
    ours = resized_image(positions, True, new)
    assert ours.shape == (new * new + 1, 6)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, state["visual.positional_embedding"].numpy(), atol=1e-5)
    grid = resample_abs_pos_embed(torch.from_numpy(positions[None, 1:]), [new, new], num_prefix_tokens=0)
    np.testing.assert_allclose(resized_image(positions[1:], False, new), grid[0].numpy(), atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(77, 248), (16, 64), (5, 7), (1, 4)])
def test_longer_text_positions_equal_open_clips(old, new):
    positions = some(old + 1, 6)
    state = {"positional_embedding": torch.from_numpy(positions[:old])}
    resize_text_pos_embed(state, model(length=new))
    expected = state["positional_embedding"].numpy()
    np.testing.assert_allclose(resized_text(positions[:old], new, False), expected, atol=1e-5)
    ours = resized_text(positions, new, True)
    np.testing.assert_allclose(ours[:-1], expected, atol=1e-5)
    np.testing.assert_array_equal(ours[-1], positions[-1])


def test_shorter_text_keeps_the_first_positions():
    positions = some(77, 6)
    np.testing.assert_array_equal(resized_text(positions, 16, False), positions[:16])
    np.testing.assert_array_equal(resized_text(positions, 76, True), positions)
    np.testing.assert_array_equal(resized_text(positions, 10, True), positions[[*range(10), 76]])


def test_no_square_is_refused():
    with pytest.raises(ConfigError, match="50 positions"):
        resized_image(some(50, 6), False, 7)
