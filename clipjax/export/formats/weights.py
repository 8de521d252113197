"""Tensors of files: safetensors, whole or in shards, and PyTorch's own; and whose names they have."""

import json
import pickle
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from clipjax.config import ConfigError, require
from clipjax.export.formats.table import Tensors

BFLOAT16 = np.dtype(jnp.bfloat16)  # whose name numpy, and so safetensors, knows once JAX is imported
PICKLED = (".bin", ".pt", ".pth")
INDEX = ".index.json"
# How the names of a library's tensors begin.
STARTS = {
    "open_clip": ("visual.", "transformer.resblocks.", "text.transformer."),
    "transformers": ("vision_model.", "text_model."),
    "big_vision": ("img/", "txt/", "params/img/", "params/txt/"),
}


def find(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of these files that the folder has, whole or as the index of its shards; None: it has none of them."""
    files = (folder / name for known in names for name in (known, known + INDEX))
    return next((file for file in files if file.is_file()), None)


def read(file: Path) -> Tensors:
    """All tensors of a safetensors file, a pickle of PyTorch's, or of the shards that an index names.

    PyTorch loads with `weights_only`, so that no program in the file runs; of a training checkpoint the `state_dict` is read.
    Names lose the `module.` of a distributed run. Raises ConfigError for a file that is missing, broken, or no such file.
    """
    if file.name.endswith(INDEX):
        shards, names = _shards(file)
        tensors = {name: tensor for shard in shards for name, tensor in read(shard).items()}
        lacking = sorted(names - tensors.keys())
        require(not lacking, "SRC", str(file), f"its shards lack {len(lacking)} of its tensors: {', '.join(lacking[:3])}")
        return tensors
    tensors = _unpickled(file) if file.suffix in PICKLED else _safetensors(file)
    module = bool(tensors) and all(name.startswith("module.") for name in tensors)
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()} if module else tensors


def require_names(names: Collection[str], origin: str, file: Path) -> None:
    """Raises ConfigError where the names are another library's than `origin`'s."""
    found = next((library for library, starts in STARTS.items() if any(name.startswith(starts) for name in names)), origin)
    remedy = f"its tensors have the names of {found}, not those of {origin}: use --from {found}"
    require(found == origin or any(name.startswith(STARTS[origin]) for name in names), "SRC", str(file), remedy)


def _shards(index: Path) -> tuple[list[Path], set[str]]:
    """The files that an index names, and the tensors that it says they hold."""
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{index}: is no index of shards: {type(error).__name__}: {error}") from error
    files = [index.parent / name for name in sorted(set(places.values()))]
    for file in files:
        require(file.is_file(), "SRC", str(index), f"names {file.name}, which is missing: put it back")
    return files, set(places)


def _safetensors(file: Path) -> Tensors:
    try:
        return safetensors.numpy.load_file(file)
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{file}: is not a complete safetensors file: {error}") from error


def _unpickled(file: Path) -> Tensors:
    try:
        import torch
    except (ImportError, OSError) as error:
        remedy = f"only PyTorch can read it, and that can't be imported ({error}): `pip install torch`, or save it as safetensors"
        raise ConfigError(f"SRC = {str(file)!r}: {remedy}") from error
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        remedy = f"PyTorch can't read it with weights_only=True ({reason}), and else it may run any program"
        raise ConfigError(f"SRC = {str(file)!r}: {remedy}; save its state_dict as safetensors") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    remedy = "holds no state_dict: save the model's as safetensors"
    require(isinstance(content, dict), "SRC", str(file), remedy)
    return {name: _array(value) for name, value in content.items() if isinstance(value, torch.Tensor)}


def _array(tensor: Any) -> np.ndarray:
    """The same numbers in numpy, to which PyTorch gives no bfloat16."""
    import torch

    return tensor.view(torch.int16).numpy().view(BFLOAT16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
