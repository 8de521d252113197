"""How long a TPU program takes by the compiler's own estimates, by part, with every loop counted as often as it runs.

The TPU compiler writes `estimated_cycles` at most instructions of an optimised program. A Mosaic kernel has none: it counts as
the larger of its FLOPs, by its own cost_estimate, at the chip's peak, and the bytes of its operands and results at the rate of
the main memory. Collectives, copies between memories and scalars have none either; they are listed, not added.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from clipjax.chips import Chip
from clipjax.hlo.loops import Integers, Known
from clipjax.hlo.products import product_flops
from clipjax.hlo.text import Computation, Instruction, byte_count, called, parse

ATTENTION, PRODUCTS, NORMS, MOVES = "attention scores", "products", "norms", "stacking and slicing"
LOSS, OPTIMIZER, TEXT, REST = "loss", "optimizer and norms", "text tower", "elementwise and other"
PARTS = (PRODUCTS, ATTENTION, NORMS, MOVES, REST, TEXT, LOSS, OPTIMIZER)

# Scopes that the models, the losses and JAX write in an instruction's op_name. Where there is none, it is the step's own.
SCOPES = ("jvp", "image", "text", "decoder", "loss")
MOVING = (
    "dynamic_update_slice", "dynamic_slice", "slice", "squeeze", "concatenate", "pad", "copy", "transpose", "reshape",
    "rev", "gather", "scatter", "dynamic-update-slice", "dynamic-slice",
)  # fmt: skip
WITHOUT_COST = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast")
CALLS = ("while", "call", "conditional", "async-start")


@dataclass
class Cycles:
    """Cycles of one device in one run of a program."""

    parts: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # by PARTS
    # Opcode -> how often one without an estimate runs; `while`: the loops of unknown length.
    uncosted: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def add(self, other: "Cycles", times: int = 1) -> None:
        for part, count in other.parts.items():
            self.parts[part] += times * count
        self.uncosted.update({opcode: times * n for opcode, n in other.uncosted.items()})


def cycles(text: str, chip: Chip | None) -> Cycles | None:
    """The cycles of a program, from `compiled.as_text()`. None: the compiler wrote no estimates, as for CPUs and GPUs.

    `chip`: what a kernel's FLOPs and bytes are measured by. Where its clock is not known, kernels are listed as uncosted.
    """
    if '"estimated_cycles"' not in text:
        return None
    computations, entry = parse(text)
    return _Walk(computations, chip).of(entry, lambda parameter, element: None)


class _Walk:
    """Follows a program from its entry through all that it calls."""

    def __init__(self, computations: dict[str, Computation], chip: Chip | None) -> None:
        self.computations, self.chip, self.integers = computations, chip, Integers(computations)

    def of(self, name: str, known: Known) -> Cycles:
        """The cycles of computation `name`. What is inside a fusion has no time of its own."""
        total = Cycles()
        computation = self.computations[name]
        for i in computation.body.values():
            if i.opcode in WITHOUT_COST:
                continue
            if count := self.own(computation, i):
                total.parts[self.part(i)] += count
            elif i.opcode not in CALLS:
                total.uncosted[i.opcode] += 1
            self.add_called(total, name, i, known)
        return total

    def add_called(self, total: Cycles, name: str, i: Instruction, known: Known) -> None:
        """Adds what an instruction calls: a function, the dearest branch, or a loop's body."""
        if i.opcode in ("call", "async-start"):
            for inner in called(self.computations, i):
                total.add(self.of(inner, self.integers.of_operands(name, i, known)))
        elif i.opcode == "conditional":
            branches = enumerate(called(self.computations, i), start=1)
            sums = [self.of(inner, self.integers.of_operands(name, i, known, n)) for n, inner in branches]
            total.add(max(sums, key=lambda branch: branch.total))
        elif i.opcode == "while":
            (body,) = i.attribute("body")
            trips = self.integers.trip_count(name, i, known)
            if trips is None:  # then its body counts once
                total.uncosted[i.opcode] += 1
            total.add(self.of(body, self.integers.in_loop(name, i, known)), 1 if trips is None else trips)

    def own(self, computation: Computation, i: Instruction) -> float:
        """The cycles of an instruction itself; 0: not known."""
        if i.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in i.attributes:
            return self.kernel(computation, i)
        found = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
        return int(found[1]) if found else 0

    def kernel(self, computation: Computation, i: Instruction) -> float:
        if self.chip is None or self.chip.clock is None:
            return 0
        flops = re.search(r'"flops":\s*"?(\d+)', i.attributes)
        moved = byte_count(i.shape) + sum(byte_count(computation.body[name].shape) for name in i.operands)
        seconds = max(int(flops[1]) / self.chip.flops if flops else 0, moved / self.chip.memory)
        return seconds * self.chip.devices * self.chip.clock

    def part(self, i: Instruction) -> str:
        """The part of a step that an instruction belongs to, by the largest product in it, or else by its own op_name."""
        found = max(self.products(i), default=(0, i), key=lambda pair: pair[0])
        names = found[1].op_name or i.op_name
        return part_of(names, i.opcode, product=found[0] > 0)

    def products(self, i: Instruction) -> Iterable[tuple[int, Instruction]]:
        """The products inside a fusion, with their FLOPs."""
        for name in called(self.computations, i) if i.opcode == "fusion" else []:
            computation = self.computations[name]
            for inner in computation.body.values():
                if flops := product_flops(computation, inner):
                    yield flops, inner
                yield from self.products(inner)


def part_of(op_name: str, opcode: str, product: bool) -> str:
    """The part of PARTS, from JAX's path of an operation, as `jit(step)/transpose(jvp(image))/while/body/norm/reduce_sum`."""
    words = re.findall(r"[^/()]+", op_name)
    if words and not any(scope in words for scope in SCOPES):
        return OPTIMIZER
    for scope, part in (("text", TEXT), ("loss", LOSS), ("attention", ATTENTION), ("norm", NORMS)):
        if scope in words:
            return part
    if product:
        return PRODUCTS
    return MOVES if (words[-1] if words else opcode) in MOVING else REST
