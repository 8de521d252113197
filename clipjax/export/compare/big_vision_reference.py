"""A model of big_vision's in PyTorch: open_clip's own reader puts its arrays into timm's and open_clip's towers."""

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from clipjax.config import ImageTower, Model, TextTower
from clipjax.data.images.image import fit
from clipjax.data.images.resize import Resize
from clipjax.data.tokenizer import Tokenizer
from clipjax.export.compare.reference import Reference, require_packages
from clipjax.export.formats.big_vision_file import POSITIONS, load
from clipjax.models.vit import sincos2d

POOLS = {"map": "map", "cls": "token", "mean": "avg"}  # timm's names


def load_big_vision(source: Path, model: Model, positions: np.ndarray | None, words: Tokenizer, resize: Resize) -> Reference:
    """`model`: the imported one, for what the file does not say. `positions`: its image positions, [n, width], which may be
    resized; None: fixed. Images and strings become pixels and ids by our own rules: there are no others in PyTorch.

    Raises ConfigError without open_clip. What comes from big_vision's own names is compared, not how they were read: open_clip
    gets the arrays as `big_vision_file.load` gives them, with all layers stacked.
    """
    require_packages("open_clip")
    import open_clip.convert
    import torch

    arrays = load(source)
    fixed = sincos2d(model.image) if positions is None else positions
    arrays[POSITIONS] = np.asarray(fixed, np.float32)[None]
    arrays.setdefault("b", np.zeros(1, np.float32))  # open_clip expects one
    scalars = {name: torch.zeros(()) for name in ("logit_scale", "logit_bias")}
    trunk, text = _image(model.image), _text(model.text)
    theirs: Any = SimpleNamespace(visual=SimpleNamespace(trunk=trunk), text=text, **scalars)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "model.npz", **arrays)  # pyright: ignore[reportArgumentType]: names with slashes are names
        open_clip.convert.load_big_vision_weights(theirs, str(Path(folder) / "model.npz"))
    if model.image.embed_dim is not None:  # open_clip's reader has no such model
        with torch.no_grad():
            trunk.head.weight.copy_(torch.from_numpy(arrays["img/head/kernel"].T))
            trunk.head.bias.copy_(torch.from_numpy(arrays.get("img/head/bias", np.zeros(model.image.embed_dim, np.float32))))

    def pixels(images: Sequence[Image.Image]) -> torch.Tensor:
        squashed = np.stack([fit(image, model.image.image_size, resize) for image in images])
        return torch.from_numpy((squashed.astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2).copy())

    def run(pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        image, writing = (z / z.norm(dim=1, keepdim=True) for z in (trunk.eval()(pixels), text.eval()(ids)))
        return image, writing, theirs.logit_scale.exp() * image @ writing.T + theirs.logit_bias

    def ids(texts: Sequence[str]) -> torch.Tensor:
        return torch.from_numpy(words.encode(texts)[0]).long()

    return Reference(pixels, ids, run, lambda text: text, other_crop=False)


def _image(tower: ImageTower) -> Any:
    """timm's tower of the same shape."""
    import torch
    from timm.models.vision_transformer import VisionTransformer

    fields: dict[str, Any] = dict(
        **dict(img_size=tower.image_size, patch_size=tower.patch_size, embed_dim=tower.width, depth=tower.depth),
        **dict(num_heads=tower.heads, mlp_ratio=_ratio(tower), act_layer="gelu_tanh", class_token=tower.class_token),
        **dict(global_pool=POOLS[tower.pool], num_classes=tower.embed_dim or 0, fc_norm=False),
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=tower.norm_eps),
    )
    return VisionTransformer(**fields)


def _text(tower: TextTower) -> Any:
    """open_clip's tower of the same shape."""
    import torch
    from open_clip.transformer import LayerNorm, TextTransformer

    fields: dict[str, Any] = dict(
        **dict(context_length=tower.length, vocab_size=tower.vocab_size, width=tower.width, heads=tower.heads),
        **dict(layers=tower.depth, mlp_ratio=_ratio(tower), output_dim=tower.embed_dim, pool_type="last", no_causal_mask=True),
        **dict(proj_type="none" if tower.embed_dim is None else "linear", proj_bias=tower.projection_bias),
        act_layer=functools.partial(torch.nn.GELU, approximate="tanh"),
        norm_layer=functools.partial(LayerNorm, eps=tower.norm_eps),
    )
    return TextTransformer(**fields)


def _ratio(tower: ImageTower | TextTower) -> float:
    """By which timm and open_clip multiply the width, and truncate: half a unit more gives exactly `mlp_dim`."""
    return (tower.mlp_dim + 0.5) / tower.width
