"""The arrays of an .npz that big_vision saved, by the names that its code has today."""

import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from clipjax.config import ConfigError, require

Arrays = dict[str, np.ndarray]

PATCH = "img/embedding/kernel"
POSITIONS = "img/pos_embedding"
# What stands before a name: with an optimizer of optax's, with Flax's old one, or nothing (big_vision utils.py `load_params`).
ROOTS = ("params/", "opt/target/", "")
# Older names, as patterns, and today's (models/vit.py `fix_old_checkpoints`; flax `convert_pre_linen`, which numbers by kind).
OLD = (
    (r"img/Transformer/(posembed_input/)?pos_embedding$", POSITIONS),
    (r"img/(probe|MlpBlock_0|MultiHeadDotProductAttention_0|LayerNorm_0)(?=/|$)", r"img/MAPHead_0/\1"),
    (r"(/encoderblock(_\d+)?)/LayerNorm_2/", r"\1/LayerNorm_1/"),
    (r"(/encoderblock(_\d+)?)/MlpBlock_3/", r"\1/MlpBlock_0/"),
    (r"(/encoderblock(_\d+)?)/MultiHeadDotProductAttention_1/", r"\1/MultiHeadDotProductAttention_0/"),
)
TWICE = "txt/Encoder_0/pos_embedding"  # positions that are added to the others (text_transformer.py `load`)
LAYER = re.compile(r"(.*/encoderblock)_(\d+)/(.*)")
# Models that clipjax has not, by a pattern for the names of their arrays.
REFUSED = {
    "txt/BertEncoder_0/": "its text tower is BERT, as of LiT-B16B and LiT-L16L: clipjax has plain text transformers",
    "txt/MAPHead_0/": "its text tower pools by attention: clipjax has the last token",
    r"img/(conv_root|gn_root|block\d+)/": "its image tower begins with a residual network: clipjax has vision transformers only",
    "img/pre_logits/": "its image tower ends in a tanh layer (rep_size), which clipjax has not",
}


def load(source: Path) -> Arrays:
    """All arrays of the model, float32: layers stacked, one array of positions a tower, nothing before `img/`, `txt/`, `t`
    and `b`. An optimizer's are not read.

    Raises ConfigError for a file that is no .npz of a model of big_vision's, and for towers that clipjax has not.
    """
    require(zipfile.is_zipfile(source), "SRC", str(source), "is not a complete .npz: name a file that big_vision saved")
    try:
        with np.load(source, allow_pickle=False) as archive:
            arrays = {name: _number(archive[raw]) for name, raw in _names(archive.files, source).items()}
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ConfigError(f"SRC = {str(source)!r}: is not a complete .npz: {error}") from error
    if TWICE in arrays:
        arrays["txt/pos_embedding"] = arrays.pop(TWICE) + arrays.get("txt/pos_embedding", 0)
    arrays |= {name: arrays[name].reshape(-1) for name in ("t", "b") if name in arrays}
    return _stacked(arrays, source)


def _names(raw: Collection[str], source: Path) -> dict[str, str]:
    """Today's name of each array of the model, and its name in the file. Those of an image tower alone get `img/` before
    them; its classifier is left out."""
    tower, names = "", {}
    root = next((root for root in ROOTS if f"{root}{PATCH}" in raw), None)
    if root is None:
        tower, root = "img/", next((root for root in ROOTS if root + PATCH.removeprefix("img/") in raw), None)
    require(root is not None, "SRC", str(source), f"has no {PATCH}: it is no model that big_vision saved")
    for name in raw:
        ours = tower + name.removeprefix(str(root))
        known = ours in ("t", "b") or ours.startswith(("img/", "txt/"))
        if not (known and name.startswith(str(root))) or (tower and ours.startswith(f"{tower}head/")):
            continue
        refusal = next((text for pattern, text in REFUSED.items() if re.match(pattern, ours)), None)
        require(refusal is None, "SRC", str(source), str(refusal))
        for pattern, new in OLD:
            ours = re.sub(pattern, new, ours)
        names[ours] = name
    return names


def _number(array: np.ndarray) -> np.ndarray:
    """float32. NumPy stores bfloat16 as bytes without a type (utils.py `recover_dtype`)."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        array = array.view(jnp.bfloat16)
    return array.astype(np.float32)


def _stacked(arrays: Mapping[str, np.ndarray], source: Path) -> Arrays:
    """The same with all layers of a tower in one array, as `scan=True` stores them."""
    stacked: Arrays = {}
    layers: dict[str, dict[int, np.ndarray]] = {}
    for name, array in arrays.items():
        if found := LAYER.fullmatch(name):
            layers.setdefault(f"{found[1]}/{found[3]}", {})[int(found[2])] = array
        else:
            stacked[name] = array
    for name, parts in layers.items():
        alike = sorted(parts) == list(range(len(parts))) and len({part.shape for part in parts.values()}) == 1
        require(alike, "SRC", str(source), f"the layers of {name} are not all there, or not of one shape")
        stacked[name] = np.stack([parts[i] for i in range(len(parts))])
    return stacked
