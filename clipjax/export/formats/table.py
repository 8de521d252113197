"""A table that maps our parameters to another library's tensors, and back.

A row is an equation. On the left: some of our parameters, each rearranged by its einops pattern, concatenated along the first
axis. On the right: some of their tensors, concatenated along the first axis. A name of theirs with {i} stands for one tensor a
layer; our parameter then has a leading axis of layers. `to_theirs` and `to_ours` are exact inverses. Both raise ConfigError if
the table does not name every parameter and every tensor.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import einops
import jax.numpy as jnp
import numpy as np

from clipjax.config import ConfigError, require

Tensors = dict[str, np.ndarray]
NAMED = 8  # tensors in a message
Precision = Literal["float32", "bfloat16", "float16"]  # of stored tensors


@dataclass(frozen=True)
class Row:
    """`theirs`: names of tensors; `ours`: pairs of a parameter's path and the einops pattern from its layout to theirs."""

    theirs: tuple[str, ...]
    ours: tuple[tuple[str, str], ...]

    @property
    def layered(self) -> bool:
        return "{i}" in self.theirs[0]

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of our parameters."""
        return tuple(path for path, _ in self.ours)

    def names(self, layers: int) -> list[list[str]]:
        """The names of their tensors, one list for each layer; a single list if the row is not layered."""
        return [[name.replace("{i}", str(i)) for name in self.theirs] for i in range(layers if self.layered else 1)]


@dataclass(frozen=True)
class Table:
    """All rows of a format. `zeros`: tensors that the other library has and our model has not, with their shapes; all zero."""

    rows: tuple[Row, ...]
    zeros: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def row(theirs: str, ours: str, pattern: str) -> Row:
    """One tensor of theirs is one parameter of ours."""
    return Row((theirs,), ((ours, pattern),))


def linear(theirs: str, ours: str, pattern: str, bias: bool = True) -> list[Row]:
    """A linear map. `theirs` has {w} for weight or bias. `pattern`: from our kernel to their weight, output axes first."""
    return joined((theirs,), ((ours, pattern),), bias)


def joined(theirs: tuple[str, ...], ours: tuple[tuple[str, str], ...], bias: bool = True) -> list[Row]:
    """Linear maps of the same input, which one side keeps in one matrix and the other in several."""
    rows = [_fill(theirs, "weight", [(f"{path}/kernel", pattern) for path, pattern in ours])]
    if bias:
        rows.append(_fill(theirs, "bias", [(f"{path}/bias", _outputs(pattern)) for path, pattern in ours]))
    return rows


def norm(theirs: str, ours: str) -> list[Row]:
    """A layer normalisation."""
    return [_fill((theirs,), "weight", [(f"{ours}/scale", "d -> d")]), _fill((theirs,), "bias", [(f"{ours}/bias", "d -> d")])]


@dataclass(frozen=True)
class BlockNames:
    """The names that another library gives to the parts of a transformer block."""

    norm1: str
    qkv: tuple[str, ...]
    out: str
    norm2: str
    up: str
    down: str


def blocks(names: BlockNames, theirs: str, ours: str) -> list[Row]:
    """All layers of a tower. `theirs`: a prefix with {i}."""
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
    """The pattern of a bias, from that of its weight: `d s h k -> (s h k) d` gives `s h k -> (s h k)`."""
    group = re.findall(r"^(?:\(.*?\)|\w+)", pattern.split(" -> ")[1])[0]
    return f"{group.strip('()')} -> {group}"


def flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The path, as `image/norm/scale`, and the leaf, for every leaf of nested parameters."""
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


def to_theirs(table: Table, params: Mapping[str, Any], dtype: Precision = "float32") -> Tensors:
    """Their tensors, contiguous, from our parameters; rounded to `dtype`, to nearest even. Raises ConfigError with all names left
    out or missing, and for a number that `dtype` can't hold.
    """
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(params)}
    mapped = {path for r in table.rows for path in r.paths}
    _refuse("export", {"without a row in the table": leaves.keys() - mapped, "missing from the model": mapped - leaves.keys()})
    tensors = {name: np.zeros(shape, jnp.dtype(dtype)) for name, shape in table.zeros.items()}
    for r in table.rows:
        for i, names in enumerate(r.names(len(leaves[r.paths[0]]) if r.layered else 1)):
            parts = [einops.rearrange(leaves[path][i] if r.layered else leaves[path], pattern) for path, pattern in r.ours]
            joint = parts[0] if len(parts) == 1 else np.concatenate(parts)
            pieces = [joint] if len(names) == 1 else np.split(joint, len(names))
            tensors |= {name: _rounded(name, piece, dtype) for name, piece in zip(names, pieces, strict=True)}
    return tensors


def _rounded(name: str, tensor: np.ndarray, dtype: Precision) -> np.ndarray:
    """A copy in C order."""
    with np.errstate(over="ignore"):
        rounded = np.array(tensor, jnp.dtype(dtype), order="C")
    if dtype != "float32":  # what is infinite already, stays so
        largest = np.abs(tensor[np.isinf(rounded) & np.isfinite(tensor)]).max(initial=0.0)
        require(not largest, "--dtype", dtype, f"{name} holds {largest:.3g}, which is more than it can hold: use float32")
    return rounded


def to_ours(table: Table, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Our nested parameters, float32, from their tensors. `shapes`: anything with a shape, as `jax.eval_shape` of `init` gives.

    Raises ConfigError with the tensors that are left out, missing, of another shape, or not zero although our model has nothing
    like it.
    """
    expected = {path: tuple(leaf.shape) for path, leaf in flatten(shapes)}
    _check_names(table, tensors, expected)
    leaves, misshapen = {}, set()
    for r in table.rows:
        layers = []
        for names in r.names(_layers(r, expected)):
            pieces = [np.asarray(tensors[name], np.float32) for name in names]
            try:
                layers.append(_split(r, pieces, [expected[path][1:] if r.layered else expected[path] for path in r.paths]))
            except (einops.EinopsError, ValueError):
                misshapen |= {f"{name} {tensors[name].shape}" for name in names}
        if not misshapen:
            parameters = (np.stack(parts) if r.layered else parts[0] for parts in zip(*layers, strict=True))
            leaves |= dict(zip(r.paths, parameters, strict=True))
    _refuse("import", {"of another shape than the model's": misshapen})
    return unflatten(leaves)


def _layers(r: Row, expected: Mapping[str, tuple[int, ...]]) -> int:
    """The number of layers of a row; 0 if the model has not its parameter."""
    path = r.paths[0]
    return expected[path][0] if r.layered and path in expected else 0


def _check_names(table: Table, tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> None:
    """Raises ConfigError unless the table names exactly the tensors and exactly the parameters. `expected`: by path."""
    names = {name for r in table.rows for layer in r.names(_layers(r, expected)) for name in layer} | table.zeros.keys()
    not_zero = {name for name in table.zeros if name in tensors and np.any(tensors[name])}
    mapped = {path for r in table.rows for path in r.paths}
    _refuse(
        "import",
        {
            "with nothing for them in the model": (tensors.keys() - names) | not_zero,
            "missing from the weights": names - tensors.keys(),
            "of the model without a row in the table": expected.keys() - mapped,
            "of the table that the model has not": mapped - expected.keys(),
        },
    )


def _split(r: Row, pieces: list[np.ndarray], shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Our side of a row, for one layer: their `pieces`, concatenated and split into parameters of these shapes.

    Raises ValueError or EinopsError if the pieces have other shapes.
    """
    joint = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    if math.prod(joint.shape) != sum(map(math.prod, shapes)):
        raise ValueError
    parts = [joint]
    if len(shapes) > 1:
        rows = [math.prod(shape) // math.prod(joint.shape[1:]) for shape in shapes]
        parts = np.split(joint, np.cumsum(rows)[:-1])
    split = []
    for part, shape, (_, pattern) in zip(parts, shapes, r.ours, strict=True):
        left, right = pattern.split(" -> ")
        split.append(einops.rearrange(part, f"{right} -> {left}", **dict(zip(left.split(), shape, strict=True))))
    return split


def _refuse(direction: str, problems: Mapping[str, set[str]]) -> None:
    named = {what: ", ".join(sorted(names)[:NAMED]) + ", and so on" * (len(names) > NAMED) for what, names in problems.items()}
    lists = [f"{len(names)} {what}: {named[what]}" for what, names in problems.items() if names]
    if lists:
        raise ConfigError(f"{direction}: the table of names leaves tensors out: {'; '.join(lists)}")
