"""What a whole program costs: its products, collectives and memory traffic, every loop as often as it runs."""

import functools
import operator
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clipjax.hlo.products import passes, product_flops
from clipjax.hlo.text import Computation, Instruction, byte_count, parse
from clipjax.hlo.traffic import between_slices, sent, traffic

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
MOST_TURNS = 100_000  # of a loop whose counter has to be followed, because the compiler doesn't tell

# Of whole numbers; a loop's counter and its bound are made of these.
ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
}
COMPARISONS = {"LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne}
PASSES_ON = ("copy", "bitcast", "convert", "reshape", "opt-barrier")
CALLS = ("fusion", "call", "custom-call", "async-start")
FUSED = ("fusion", "custom-call")

# Parameter number and element of it, where it is a tuple -> a whole number, if it is a known one.
Known = Callable[[int, int | None], Any]


@dataclass(frozen=True)
class Collective:
    """One kind of transfer between devices."""

    count: int  # how often it runs
    bytes: int  # in all of these: what a device gives or what it gets, whichever is more


@dataclass(frozen=True)
class Cost:
    """What one run of a program costs one device."""

    flops: int  # 2 m n k for every product; of a convolution, where its window meets the picture
    collectives: dict[str, Collective]  # by kind; those within a slice, and as `all-gather between slices` the others
    started: int  # collectives that the text starts and awaits apart, each once
    overlapped: int  # those of them with a product in between
    uncounted: tuple[str, ...]  # loops whose turns could not be told; their bodies are counted once
    tpu_flops: int  # times the passes that a TPU makes for float32 operands: 6 at the highest precision
    memory_bytes: int  # read from the device's memory and written to it, as far as the text tells
    sent_bytes: int  # over the links to other devices of its slice
    sent_across: int  # over the network to and from other slices, whichever is more


def cost(text: str) -> Cost:
    """The cost of a program, from `compiled.as_text()`."""
    return _Program(*parse(text)).cost()


class _Program:
    def __init__(self, computations: dict[str, Computation], entry: str) -> None:
        self.computations, self.entry = computations, entry

    def cost(self) -> Cost:
        tally = self.tally(self.entry, lambda parameter, element: None)
        moved = {}  # (kind, channel) -> count and bytes; of a transfer in pieces each has it, and a loop's more often
        across = {}  # (kind, pair) -> count and bytes of the larger half
        for what, *key in tally:
            figures = tally[what, *key], tally["bytes", *key[:-1], key[-1]] if key else 0
            if what == "count":
                moved[*key[:2],] = min(moved.get((*key[:2],), figures), figures)
            elif what == "halves":
                across[*key[:2],] = max(across.get((*key[:2],), figures), figures, key=lambda figures: figures[1])
        kinds = dict.fromkeys(kind for kind in (*COLLECTIVES, *(kind for kind, _ in across)))
        found = {kind: [f for (k, _), f in (moved | across).items() if k == kind] for kind in kinds}
        collectives = {kind: Collective(*map(sum, zip(*f, strict=True))) for kind, f in found.items() if f}
        inside = sum(sent(kind, c.bytes) for kind, c in collectives.items() if kind in COLLECTIVES)
        pairs = [pair for computation in self.computations.values() for pair in self.pairs(computation)]
        uncounted = tuple(sorted(key[1] for key in tally if key[0] == "uncounted"))
        flops, dear, memory = (tally[name,] for name in ("flops", "tpu_flops", "memory"))
        network = sum(size for _, size in across.values())
        return Cost(flops, collectives, len(pairs), sum(pairs), uncounted, dear, memory, inside, network)

    def tally(self, name: str, known: Known, fused: bool = False) -> Counter[tuple[str, ...]]:
        """Sums over all that a computation runs; what is fused reads and writes no memory but at the fusion's ends."""
        total = Counter()
        computation = self.computations[name]
        for i in computation.body.values():
            if flops := product_flops(computation, i):
                total["flops",] += flops
                total["tpu_flops",] += flops * passes(computation, i)
            if not fused:
                total["memory",] += traffic(computation, i, self.computations)
            kind = i.opcode.removesuffix("-done")
            if kind in COLLECTIVES:
                key = kind, (fused and "".join(i.attribute("channel_id"))) or i.name, i.name
                total["count", *key] += 1
                total["bytes", *key] += self.bytes(computation, i)
            if half := between_slices(computation, i):
                *key, size = *half[:2], i.name, half[2]
                total["halves", *key] += 1
                total["bytes", *key] += size
            if i.opcode in CALLS:
                for called in self.called(i):
                    total.update(self.tally(called, self.of_operands(name, i, known), fused or i.opcode in FUSED))
            elif i.opcode == "conditional":  # the dearest branch
                branches = enumerate(self.called(i), start=1)
                tallies = [self.tally(called, self.of_operands(name, i, known, n)) for n, called in branches]
                total.update(max(tallies, key=lambda tally: tally["flops",]))
            elif i.opcode == "while":
                (body,) = i.attribute("body")
                turns = self.turns(name, i, known)
                if turns is None:
                    total["uncounted", i.name] = 1
                one = self.tally(body, lambda _, element, loop=i.name: self.value(name, loop, known=known, element=element))
                total.update({key: (1 if turns is None else turns) * n for key, n in one.items()})
        return total

    def called(self, i: Instruction) -> list[str]:
        keys = ("calls", "to_apply", "called_computations", "branch_computations", "true_computation", "false_computation")
        return [name for key in keys for name in i.attribute(key) if name in self.computations]

    def bytes(self, computation: Computation, i: Instruction) -> int:
        """What a collective takes or what it gives. A -done knows the latter, the -start it belongs to the former."""
        start = computation.body[i.operands[0]] if i.opcode.endswith("-done") else i
        return max(byte_count(i.shape), sum(byte_count(computation.body[name].shape) for name in start.operands))

    def pairs(self, computation: Computation) -> list[bool]:
        """For every collective that is started and awaited apart: whether a product runs before it is done."""
        order, at, found = list(computation.body.values()), {}, []
        for n, i in enumerate(order):
            begun, done = self.marks(i)
            found += [any(self.has_product(computation, j) for j in order[at.pop(key) : n + 1]) for key in done if key in at]
            at |= dict.fromkeys(begun, n)
        return found

    def marks(self, i: Instruction) -> tuple[list[str], list[str]]:
        """Which collectives an instruction starts, and which it awaits: itself, or a fusion that carries a piece of one."""
        if i.opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
            return [i.name] * i.opcode.endswith("-start"), [*i.operands[:1]] * i.opcode.endswith("-done")
        inside = [j for name in self.called(i) for j in self.computations[name].body.values()] if i.opcode == "fusion" else []
        calls = "".join(j.attributes for j in inside if j.opcode == "custom-call")
        channels = [channel for j in inside if j.opcode in COLLECTIVES for channel in j.attribute("channel_id")]
        return channels * ('"AsyncCollectiveStart"' in calls), channels * ('"AsyncCollectiveDone"' in calls)

    def has_product(self, computation: Computation, i: Instruction) -> bool:
        below = [*self.called(i), *i.attribute("body")] if i.opcode in (*CALLS, "conditional", "while") else []
        return product_flops(computation, i) > 0 or any(
            self.has_product(self.computations[name], j) for name in below for j in self.computations[name].body.values()
        )

    def turns(self, name: str, loop: Instruction, known: Known) -> int | None:
        """How often a loop runs: told by the compiler, or by following what its condition reads."""
        if told := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(told[1])
        (condition,), (body,) = loop.attribute("condition"), loop.attribute("body")
        state = self.of_operands(name, loop, known)
        for turn in range(MOST_TURNS):
            more = self.value(condition, self.computations[condition].root, known=state)
            if not isinstance(more, int):
                return None
            if not more:
                return turn
            state = functools.cache(functools.partial(self.after, body, state))
        return None

    def after(self, body: str, before: Known, parameter: int, element: int | None) -> Any:
        """An element of a loop's state, one turn after `before`."""
        return self.value(body, self.computations[body].root, element=element, known=before)

    def of_operands(self, name: str, i: Instruction, known: Known, first: int = 0) -> Known:
        """What the operands of a call, from the first that counts, say of the parameters of what it calls."""
        return lambda parameter, element: self.value(name, i.operands[first + parameter], element=element, known=known)

    def value(self, name: str, of: str, *, known: Known, element: int | None = None) -> Any:
        """What an instruction (an element of its tuple) is, where that is a whole number that can be told; else None."""
        i = self.computations[name].body[of]

        def operand(n: int, element: int | None = None) -> Any:
            return self.value(name, i.operands[n], known=known, element=element)

        if i.opcode == "constant":
            words = {"true": 1, "false": 0}
            return words.get(i.inside, int(i.inside) if re.fullmatch(r"-?\d+", i.inside) else None)
        if i.opcode == "parameter":
            return known(int(i.inside), element)
        if i.opcode == "get-tuple-element":
            return operand(0, i.number("index"))
        if i.opcode == "tuple" and element is not None:
            return operand(element)
        if i.opcode in PASSES_ON:
            return operand(0, element)
        if i.opcode in ("fusion", "call"):
            (called,) = self.called(i)
            inner = self.of_operands(name, i, known)
            return self.value(called, self.computations[called].root, known=inner, element=element)
        if i.opcode == "while":  # known still, if every turn hands it on as it is
            (body,) = i.attribute("body")
            handed_on = self.value(body, self.computations[body].root, known=lambda _, n: ("element", n), element=element)
            return operand(0, element) if handed_on == ("element", element) else None
        if i.opcode in ARITHMETIC or i.opcode == "compare":
            a, b = operand(0), operand(1)
            if not (isinstance(a, int) and isinstance(b, int)):
                return None
            return ARITHMETIC[i.opcode](a, b) if i.opcode in ARITHMETIC else int(COMPARISONS[i.attribute("direction")[0]](a, b))
        return None
