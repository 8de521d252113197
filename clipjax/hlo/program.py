"""The cost of a program: products, collectives and memory traffic, with every loop counted as often as it runs."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from clipjax.hlo.loops import Integers, Known
from clipjax.hlo.products import passes, product_flops
from clipjax.hlo.text import Computation, Instruction, arrays, byte_count, called, parse
from clipjax.hlo.traffic import between_slices, sent, traffic

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
CALLS = ("fusion", "call", "custom-call", "async-start")
FUSED = ("fusion", "custom-call")

# Kind; channel, or name where there is no channel; and the name of the instruction.
Transfer = tuple[str, str, str]


@dataclass(frozen=True)
class Collective:
    """One kind of transfer between devices."""

    count: int  # how often it runs
    bytes: int  # in all of these: what a device gives or what it gets, whichever is more


@dataclass(frozen=True)
class Cost:
    """The cost of one run of a program, for one device."""

    flops: int  # 2 m n k of every product; of a convolution only where its window covers the image, not the padding
    collectives: dict[str, Collective]  # by kind: those within a slice; those across slices as `all-gather between slices`
    started: int  # collectives that the text starts and awaits in two instructions, each counted once
    overlapped: int  # those of them with a product in between
    uncounted: tuple[str, ...]  # loops with an unknown trip count; their bodies are counted once
    tpu_flops: int  # `flops` times the passes that a TPU needs for float32 operands: 6 at the highest precision
    memory_bytes: int  # read from and written to the device's memory, as far as the text shows
    sent_bytes: int  # over the links to other devices of its slice
    sent_between_slices: int  # bytes over the network to or from other slices, whichever is more
    gathered: frozenset[int] = frozenset()  # sizes, in numbers, of the arrays that devices gather, or sum, in full


def cost(text: str) -> Cost:
    """The cost of a program, from `compiled.as_text()`."""
    return _Program(*parse(text)).cost()


@dataclass
class _Totals:
    """Sums over everything that a computation runs."""

    flops: int = 0
    tpu_flops: int = 0
    memory_bytes: int = 0
    counts: Counter[Transfer] = field(default_factory=Counter)
    bytes: Counter[Transfer] = field(default_factory=Counter)
    uncounted: set[str] = field(default_factory=set)

    def add(self, other: "_Totals", times: int = 1) -> None:
        self.flops += times * other.flops
        self.tpu_flops += times * other.tpu_flops
        self.memory_bytes += times * other.memory_bytes
        for mine, theirs in ((self.counts, other.counts), (self.bytes, other.bytes)):
            mine.update({key: times * n for key, n in theirs.items()})
        self.uncounted |= other.uncounted

    def add_transfer(self, transfer: Transfer, size: int) -> None:
        self.counts[transfer] += 1
        self.bytes[transfer] += size

    def collectives(self) -> dict[str, Collective]:
        """The collectives, by kind. Several instructions may be one transfer, which then counts once.

        A transfer in pieces has an instruction for each piece, and a piece in a loop runs more often: the least of them counts.
        Of the two halves of a transfer between slices, what is sent and what is received, the larger counts.
        """
        found: dict[tuple[str, str], tuple[int, int]] = {}
        for (kind, channel, name), count in self.counts.items():
            figures = count, self.bytes[kind, channel, name]
            known = found.get((kind, channel), figures)
            found[kind, channel] = min(known, figures) if kind in COLLECTIVES else max(known, figures, key=lambda x: x[1])
        kinds = dict.fromkeys((*COLLECTIVES, *(kind for kind, _ in found)))
        by_kind = {kind: [figures for (k, _), figures in found.items() if k == kind] for kind in kinds}
        return {kind: Collective(*map(sum, zip(*all_of_it, strict=True))) for kind, all_of_it in by_kind.items() if all_of_it}


class _Program:
    def __init__(self, computations: dict[str, Computation], entry: str) -> None:
        self.computations, self.entry, self.integers = computations, entry, Integers(computations)

    def cost(self) -> Cost:
        totals = self.totals(self.entry, lambda parameter, element: None)
        collectives = totals.collectives()
        overlaps = [overlap for computation in self.computations.values() for overlap in self.overlaps(computation)]
        return Cost(
            flops=totals.flops,
            collectives=collectives,
            started=len(overlaps),
            overlapped=sum(overlaps),
            uncounted=tuple(sorted(totals.uncounted)),
            tpu_flops=totals.tpu_flops,
            memory_bytes=totals.memory_bytes,
            sent_bytes=sum(sent(kind, c.bytes) for kind, c in collectives.items() if kind in COLLECTIVES),
            sent_between_slices=sum(c.bytes for kind, c in collectives.items() if kind not in COLLECTIVES),
            gathered=frozenset(self.gathered()),
        )

    def gathered(self) -> Iterable[int]:
        """The sizes of the results of all gathers and sums; where a piece of one is in a fusion, of the piece."""
        for computation in self.computations.values():
            for i in computation.body.values():
                if i.opcode.removesuffix("-start").removesuffix("-done") in ("all-gather", "all-reduce"):
                    yield from (math.prod(dims) for _, dims in arrays(i.shape))

    def totals(self, name: str, known: Known, fused: bool = False) -> _Totals:
        """The sums of computation `name`. Inside a fusion nothing reads or writes memory; the fusion itself does."""
        total = _Totals()
        computation = self.computations[name]
        for i in computation.body.values():
            if flops := product_flops(computation, i):
                total.flops += flops
                total.tpu_flops += flops * passes(computation, i)
            if not fused:
                total.memory_bytes += traffic(computation, i, self.computations)
            kind = i.opcode.removesuffix("-done")
            if name.startswith("all-reduce-scatter"):  # a TPU's fusion of a sum and of the part of it that the device needs
                kind = kind.replace("all-reduce", "reduce-scatter")
            if kind in COLLECTIVES:
                channel = (fused and "".join(i.attribute("channel_id"))) or i.name
                total.add_transfer((kind, channel, i.name), self.bytes(computation, i))
            if half := between_slices(computation, i):
                kind, pair, size = half
                total.add_transfer((kind, pair, i.name), size)
            self.add_called(total, name, i, known, fused)
        return total

    def add_called(self, total: _Totals, name: str, i: Instruction, known: Known, fused: bool) -> None:
        """Adds the sums of what an instruction calls: a function, the branch with the most FLOPs, or a loop's body."""
        if i.opcode in CALLS:
            for inner in called(self.computations, i):
                total.add(self.totals(inner, self.integers.of_operands(name, i, known), fused or i.opcode in FUSED))
        elif i.opcode == "conditional":
            branches = enumerate(called(self.computations, i), start=1)
            sums = [self.totals(inner, self.integers.of_operands(name, i, known, n)) for n, inner in branches]
            total.add(max(sums, key=lambda branch: branch.flops))
        elif i.opcode == "while":
            (body,) = i.attribute("body")
            trips = self.integers.trip_count(name, i, known)
            if trips is None:
                total.uncounted.add(i.name)
            total.add(self.totals(body, self.integers.in_loop(name, i, known)), 1 if trips is None else trips)

    def bytes(self, computation: Computation, i: Instruction) -> int:
        """What a collective takes or what it gives, whichever is more. A -done shows the latter, its -start the former."""
        start = computation.body[i.operands[0]] if i.opcode.endswith("-done") else i
        return max(byte_count(i.shape), sum(byte_count(computation.body[name].shape) for name in start.operands))

    def overlaps(self, computation: Computation) -> Iterable[bool]:
        """For every collective that is started and awaited in two instructions: whether a product runs in between."""
        order, started_at = list(computation.body.values()), {}
        for n, i in enumerate(order):
            started, done = self.started_and_done(i)
            for key in done:
                if key in started_at:
                    yield any(self.has_product(computation, j) for j in order[started_at.pop(key) : n + 1])
            started_at |= dict.fromkeys(started, n)

    def started_and_done(self, i: Instruction) -> tuple[list[str], list[str]]:
        """The collectives that an instruction starts, and those it awaits: itself, or a fusion with a piece of one inside."""
        if i.opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
            return [i.name] * i.opcode.endswith("-start"), [*i.operands[:1]] * i.opcode.endswith("-done")
        fused = called(self.computations, i) if i.opcode == "fusion" else []
        inside = [j for name in fused for j in self.computations[name].body.values()]
        custom_calls = "".join(j.attributes for j in inside if j.opcode == "custom-call")
        channels = [channel for j in inside if j.opcode in COLLECTIVES for channel in j.attribute("channel_id")]
        return channels * ('"AsyncCollectiveStart"' in custom_calls), channels * ('"AsyncCollectiveDone"' in custom_calls)

    def has_product(self, computation: Computation, i: Instruction) -> bool:
        calls = i.opcode in (*CALLS, "conditional", "while")
        inner = [*called(self.computations, i), *i.attribute("body")] if calls else []
        return product_flops(computation, i) > 0 or any(
            self.has_product(self.computations[name], j) for name in inner for j in self.computations[name].body.values()
        )
