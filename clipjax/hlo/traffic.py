"""The bytes that an instruction moves: to and from a device's memory, and to other devices. Estimates, for a roofline.

Memory is the main memory, a TPU's HBM. Arrays in another memory space, as S(1), a TPU's vector memory, cost nothing here.
"""

import re

from clipjax.hlo.products import LIBRARY_PRODUCT
from clipjax.hlo.text import Computation, Instruction, byte_count

# These neither read nor write memory, or another instruction is counted for them.
FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "iota", "async-start", "async-update", "send", "recv",
)  # fmt: skip
MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
SLICES = ("dynamic-slice", "slice", "gather")
VIEWS = ("bitcast", "copy", "reshape", "transpose", "convert")  # inside a fusion: the same numbers, read once


def traffic(computation: Computation, i: Instruction, computations: dict[str, Computation]) -> int:
    """Bytes that an instruction outside any fusion reads from and writes to main memory in one run."""
    if i.opcode in FREE or i.opcode.endswith("-done"):
        return 0
    operands = [computation.body[name] for name in i.operands]
    if i.opcode == "fusion":
        return _of_fusion(i, operands, computations)
    if i.opcode in SLICES:
        return 2 * _main(i.shape)
    if i.opcode == "dynamic-update-slice":
        return 2 * _main(operands[1].shape)
    if i.opcode.endswith("-start"):  # of a copy, the first of the tuple is its destination
        return sum(_main(x.shape) for x in operands) + (_main(_elements(i.shape)[0]) if i.opcode == "copy-start" else 0)
    written = _elements(i.shape)
    if LIBRARY_PRODUCT.search(i.attributes) and len(written) > 1:
        written = written[:-1]  # the last is room for the library, which need not use it
    return sum(_main(x) for x in [*written, *(x.shape for x in operands)])


def _of_fusion(i: Instruction, operands: list[Instruction], computations: dict[str, Computation]) -> int:
    """Bytes that a fusion moves. Of a slice only the part that is read counts, of an update only the part that is written; of
    unchanged arrays, nothing."""
    inner = next((computations[name] for name in i.attribute("calls") if name in computations), None)
    if inner is None:
        return _main(i.shape) + sum(_main(x.shape) for x in operands)

    def bytes_written(name: str, shape: str) -> int:
        """Bytes written for an output of the fusion."""
        source = inner.body[name]
        while source.opcode == "bitcast":
            source = inner.body[source.operands[0]]
        if source.opcode == "parameter":
            return 0
        if source.opcode == "dynamic-update-slice":
            return _main(shape) and byte_count(inner.body[source.operands[1]].shape)
        return _main(shape)

    total = sum(_read(computations, inner, n, size) for n, x in enumerate(operands) if (size := _main(x.shape)))
    outputs = zip(_leaves(inner, inner.root), _elements(i.shape), strict=True)
    return total + sum(bytes_written(name, shape) for name, shape in outputs)


def _read(computations: dict[str, Computation], fused: Computation, number: int, size: int) -> int:
    """Bytes that a fusion reads of its n-th operand, whose `size` is in main memory, by the instructions that use it."""
    users: dict[str, list[Instruction]] = {}
    for user in fused.body.values():
        for name in user.operands:
            users.setdefault(name, []).append(user)

    def of_value(name: str) -> int:
        parts = []
        for user in users.get(name, []):
            inner = [x for x in user.attribute("calls") if x in computations] if user.opcode == "fusion" else []
            if user.opcode in SLICES and user.operands[0] == name:
                parts.append(byte_count(user.shape))
            elif user.opcode in VIEWS and user.name != fused.root:
                parts.append(of_value(user.name))
            elif inner:  # a fusion in a fusion
                parts.append(_read(computations, computations[inner[0]], user.operands.index(name), size))
            elif not (user.opcode == "tuple" or (user.opcode == "dynamic-update-slice" and user.operands[0] == name)):
                return size
        return min(size, sum(parts))

    named = next((p.name for p in fused.body.values() if p.opcode == "parameter" and int(p.inside) == number), None)
    return 0 if named is None else of_value(named)


def _leaves(computation: Computation, name: str) -> list[str]:
    """For each array of a tuple, which may be of tuples: the instruction that gives it."""
    i = computation.body[name]
    if i.opcode != "tuple":
        return [name] * len(_elements(i.shape))
    return [leaf for operand in i.operands for leaf in _leaves(computation, operand)]


def _main(shape: str) -> int:
    """Bytes of an array, or of all arrays in a tuple, that are in main memory."""
    return sum(byte_count(x) for x in _elements(shape) if not re.search(r"S\([1-9]", x))


def _elements(shape: str) -> list[str]:
    """The arrays of a tuple, each with its layout; of an array, itself."""
    return re.findall(r"[a-z]\w*\[[\d,]*\](?:\{[^}]*\})?", shape)


def sent(kind: str, size: int) -> int:
    """Bytes that a device sends in a collective, round a ring. `size`: what it gives or what it gets, whichever is more."""
    return 2 * size if kind == "all-reduce" else size


def between_slices(computation: Computation, i: Instruction) -> tuple[str, str, int] | None:
    """If `i` is one half of a transfer between slices: its kind, the name that both halves have, and its bytes. Else None.

    The compiler makes a program for one slice. What goes to other slices and comes from them is a `send` and a `recv` of the
    runtime."""
    if i.opcode not in ("send", "recv") or not (found := MEGASCALE.search(i.attributes)):
        return None
    pair = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', i.attributes)
    shape = computation.body[i.operands[0]].shape if i.opcode == "send" else _elements(i.shape)[0]
    return found[1].lower().replace("_", "-") + " between slices", pair[1] if pair else i.name, byte_count(shape)
