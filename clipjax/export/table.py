"""A table between our parameters and another library's tensors, read in both directions.

A row equates some of ours with some of theirs: ours, each rearranged by its einops pattern and concatenated along the first
axis, are theirs concatenated along the first axis. A name of theirs with {i} stands for one tensor a layer, where ours have a
leading axis of layers. `to_theirs` and `to_ours` are exact inverses, and refuse whatever a table leaves out.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import einops
import numpy as np

from clipjax.config import ConfigError

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Row:
    """`theirs`: names; `ours`: pairs of a parameter's path and the pattern that lays it out as theirs."""

    theirs: tuple[str, ...]
    ours: tuple[tuple[str, str], ...]

    @property
    def layered(self) -> bool:
        return "{i}" in self.theirs[0]

    def names(self, layers: int) -> list[list[str]]:
        """Their names, one list a layer; a single list where the row is not of layers."""
        return [[name.replace("{i}", str(i)) for name in self.theirs] for i in range(layers if self.layered else 1)]


@dataclass(frozen=True)
class Table:
    """All rows of a format, and the tensors that the other library has where our model has nothing: they are zero."""

    rows: tuple[Row, ...]
    zeros: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def row(theirs: str, ours: str, pattern: str) -> Row:
    """One of theirs, one of ours."""
    return Row((theirs,), ((ours, pattern),))


def linear(theirs: str, ours: str, pattern: str, bias: bool = True) -> list[Row]:
    """A linear map: `theirs` holds {w} for weight or bias, `pattern` lays the kernel out as the weight, output axes first."""
    return joined((theirs,), ((ours, pattern),), bias)


def joined(theirs: tuple[str, ...], ours: tuple[tuple[str, str], ...], bias: bool = True) -> list[Row]:
    """Linear maps from one input, whose outputs one side joins where the other has them apart."""
    rows = [_fill(theirs, "weight", [(f"{path}/kernel", pattern) for path, pattern in ours])]
    if bias:
        rows.append(_fill(theirs, "bias", [(f"{path}/bias", _outputs(pattern)) for path, pattern in ours]))
    return rows


def norm(theirs: str, ours: str) -> list[Row]:
    """A layer normalisation."""
    return [_fill((theirs,), "weight", [(f"{ours}/scale", "d -> d")]), _fill((theirs,), "bias", [(f"{ours}/bias", "d -> d")])]


@dataclass(frozen=True)
class BlockNames:
    """What another library calls the parts of a transformer block."""

    norm1: str
    qkv: tuple[str, ...]
    out: str
    norm2: str
    up: str
    down: str


def blocks(names: BlockNames, theirs: str, ours: str) -> list[Row]:
    """All layers of a tower; `theirs` is a prefix with {i}."""
    attention, mlp = f"{ours}/attention", f"{ours}/mlp"
    return [
        *norm(theirs + names.norm1, f"{ours}/norm1"),
        *joined(tuple(theirs + name for name in names.qkv), ((f"{attention}/qkv", "d s h k -> (s h k) d"),)),
        *linear(theirs + names.out, f"{attention}/out", "h k d -> d (h k)"),
        *norm(theirs + names.norm2, f"{ours}/norm2"),
        *linear(theirs + names.up, f"{mlp}/up", "d f -> f d"),
        *linear(theirs + names.down, f"{mlp}/down", "f d -> d f"),
    ]


def _fill(names: tuple[str, ...], part: str, ours: list[tuple[str, str]]) -> Row:
    return Row(tuple(name.replace("{w}", part) for name in names), tuple(ours))


def _outputs(pattern: str) -> str:
    """The bias's pattern: the first group of a weight's. `d s h k -> (s h k) d` gives `s h k -> (s h k)`."""
    group = re.match(r"\(.*?\)|\w+", pattern.split(" -> ")[1]).group()
    return f"{group.strip('()')} -> {group}"


def flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`image/norm/scale` and its leaf, for every leaf of nested parameters."""
    for key, value in params.items():
        yield from flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    params: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return params


def to_theirs(table: Table, params: Mapping[str, Any]) -> Tensors:
    """Their tensors, float32 and contiguous, from our parameters. Raises ConfigError listing all that is left out or missing."""
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(params)}
    mapped = {path for r in table.rows for path, _ in r.ours}
    _refuse("export", {"without a row in the table": leaves.keys() - mapped, "missing from the model": mapped - leaves.keys()})
    tensors = {name: np.zeros(shape, np.float32) for name, shape in table.zeros.items()}
    for r in table.rows:
        for i, names in enumerate(r.names(len(leaves[r.ours[0][0]]) if r.layered else 1)):
            parts = [einops.rearrange(leaves[path][i] if r.layered else leaves[path], pattern) for path, pattern in r.ours]
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
            pieces = [whole] if len(names) == 1 else np.split(whole, len(names))
            tensors |= {name: np.array(piece, order="C") for name, piece in zip(names, pieces, strict=True)}
    return tensors


def to_ours(table: Table, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Our nested parameters from their tensors. `shapes` holds anything with a shape, as `jax.eval_shape` of `init` gives.

    Raises ConfigError listing every tensor left out, missing, of another shape, or not zero where our model has nothing.
    """
    want = {path: tuple(leaf.shape) for path, leaf in flatten(shapes)}
    mapped = {path for r in table.rows for path, _ in r.ours}
    layers = {r: want[r.ours[0][0]][0] for r in table.rows if r.layered and r.ours[0][0] in want}
    names = {name for r in table.rows for group in r.names(layers.get(r, 0)) for name in group} | table.zeros.keys()
    nonzero = {name for name in table.zeros if name in tensors and np.any(tensors[name])}
    _refuse(
        "import",
        {
            "with nothing for them in the model": (tensors.keys() - names) | nonzero,
            "missing from the weights": names - tensors.keys(),
            "of the model without a row in the table": want.keys() - mapped,
            "of the table that the model has not": mapped - want.keys(),
        },
    )
    leaves, wrong = {}, set()
    for r in table.rows:
        per_layer: list[list[np.ndarray]] = []
        for group in r.names(layers.get(r, 1)):
            try:
                per_layer.append(_ours(r, [np.asarray(tensors[name], np.float32) for name in group], want))
            except (einops.EinopsError, ValueError):
                wrong |= {f"{name} {tensors[name].shape}" for name in group}
        for (path, _), layer in zip(r.ours, zip(*per_layer, strict=True), strict=False):
            leaves[path] = np.stack(layer) if r.layered else layer[0]
    _refuse("import", {"of another shape than the model's": wrong})
    return unflatten(leaves)


def _ours(r: Row, pieces: list[np.ndarray], want: Mapping[str, tuple[int, ...]]) -> list[np.ndarray]:
    """Our side of a row, for one layer."""
    whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    shapes = [want[path][1:] if r.layered else want[path] for path, _ in r.ours]
    if math.prod(whole.shape) != sum(map(math.prod, shapes)):
        raise ValueError
    parts = [whole]
    if len(shapes) > 1:
        rows = [math.prod(shape) // math.prod(whole.shape[1:]) for shape in shapes]
        parts = np.split(whole, np.cumsum(rows)[:-1])
    out = []
    for part, shape, (_, pattern) in zip(parts, shapes, r.ours, strict=True):
        left, right = pattern.split(" -> ")
        out.append(einops.rearrange(part, f"{right} -> {left}", **dict(zip(left.split(), shape, strict=True))))
    return out


def _refuse(direction: str, problems: Mapping[str, set[str]]) -> None:
    lists = [f"{len(names)} {what}: {', '.join(sorted(names))}" for what, names in problems.items() if names]
    if lists:
        raise ConfigError(f"{direction}: the table of names leaves tensors out: {'; '.join(lists)}")
