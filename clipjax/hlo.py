"""What a compiled program does, read from the text of its optimised HLO: products, collectives, and what overlaps.

XLA's own cost analysis counts the body of a loop once; here it counts as often as it runs. All figures are one device's.
"""

import functools
import math
import operator
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
LIBRARY_PRODUCT = re.compile(r'custom_call_target="__(onednn\$matmul|cublas\$(lt\$)?(gemm|matmul))')
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
    collectives: dict[str, Collective]  # by kind
    permutes: int  # pairs of collective-permute-start and -done in the text
    overlapped: int  # those of them with a product in between
    uncounted: tuple[str, ...]  # loops whose turns could not be told; their bodies are counted once


@dataclass(frozen=True)
class Instruction:
    """`name = shape opcode(inside), attributes`."""

    name: str
    shape: str
    opcode: str
    inside: str  # operands, a parameter's number or a constant's value
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, key: str) -> list[str]:
        """The words of `key=word` or `key={word, word}`."""
        found = re.search(rf"\b{key}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return re.findall(r"[^\s,{}%]+", found[1]) if found else []

    def number(self, key: str) -> int:
        return int(self.attribute(key)[0])


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order in which they run."""

    body: dict[str, Instruction]
    root: str


def cost(text: str) -> Cost:
    """The cost of a program, from `compiled.as_text()`."""
    return _Program(*parse(text)).cost()


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, and the name of the one that runs."""
    found, entry, name, body, root = {}, "", "", {}, ""
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([^\s(]+) ", line)):
            name, body, root = head[2], {}, ""
            entry = name if head[1] else entry
        elif line.startswith("}") and root:
            found[name] = Computation(body, root)
        elif parts := re.match(r"\s+(ROOT )?%?(\S+) = (.*)", line):
            body[parts[2]] = _instruction(parts[2], parts[3])
            root = parts[2] if parts[1] else root
    return found, entry


def _instruction(name: str, text: str) -> Instruction:
    text = re.sub(r', metadata=\{(?:[^}"]|"(?:\\.|[^"\\])*")*\}|/\*.*?\*/', "", text)
    end = _closed(text, 0) if text.startswith("(") else text.index(" ")
    opening = text.index("(", end)
    closed = _closed(text, opening)
    inside = text[opening + 1 : closed - 1]
    operands = tuple(re.findall(r"%([^\s,()]+)", inside))
    return Instruction(name, text[:end], text[end:opening].strip(), inside, operands, text[closed:])


def _closed(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` has closed."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"not an instruction of HLO: {text}")


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Kind of number and sizes of an array, or of all in a tuple."""
    return [(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in re.findall(r"([a-z]\w*)\[([\d,]*)\]", shape)]


def byte_count(shape: str) -> int:
    """Of an array, or of all in a tuple."""

    def bits(kind: str) -> int:
        digits = re.search(r"\d+", kind)
        return 8 if kind == "pred" else int(digits[0]) if digits else 0  # a token has none

    return sum(math.prod(dims) * bits(kind) // 8 for kind, dims in arrays(shape))


class _Program:
    def __init__(self, computations: dict[str, Computation], entry: str) -> None:
        self.computations, self.entry = computations, entry

    def cost(self) -> Cost:
        tally = self.tally(self.entry, lambda parameter, element: None)
        kinds = [kind for kind in COLLECTIVES if tally[kind, "count"]]
        collectives = {kind: Collective(tally[kind, "count"], tally[kind, "bytes"]) for kind in kinds}
        pairs = [pair for computation in self.computations.values() for pair in self.pairs(computation)]
        uncounted = tuple(sorted(name for kind, name in tally if kind == "uncounted"))
        return Cost(tally["flops", ""], collectives, len(pairs), sum(pairs), uncounted)

    def tally(self, name: str, known: Known) -> Counter[tuple[str, str]]:
        """Sums over all that a computation runs."""
        total = Counter()
        computation = self.computations[name]
        for i in computation.body.values():
            total["flops", ""] += self.flops(computation, i)
            kind = i.opcode.removesuffix("-done")
            if kind in COLLECTIVES:
                total[kind, "count"] += 1
                total[kind, "bytes"] += self.bytes(computation, i)
            if i.opcode in CALLS:
                for called in self.called(i):
                    total.update(self.tally(called, self.of_operands(name, i, known)))
            elif i.opcode == "conditional":  # the dearest branch
                branches = enumerate(self.called(i), start=1)
                tallies = [self.tally(called, self.of_operands(name, i, known, n)) for n, called in branches]
                total.update(max(tallies, key=lambda tally: tally["flops", ""]))
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
        """For every collective-permute that is started: whether a product runs before it is done."""
        order = list(computation.body.values())
        at = {i.name: n for n, i in enumerate(order)}
        done = [i for i in order if i.opcode == "collective-permute-done"]
        return [any(self.has_product(computation, j) for j in order[at[i.operands[0]] : at[i.name]]) for i in done]

    def has_product(self, computation: Computation, i: Instruction) -> bool:
        below = [*self.called(i), *i.attribute("body")] if i.opcode in (*CALLS, "conditional", "while") else []
        return self.flops(computation, i) > 0 or any(
            self.has_product(self.computations[name], j) for name in below for j in self.computations[name].body.values()
        )

    def flops(self, computation: Computation, i: Instruction) -> int:
        """Of the instruction itself."""
        if i.opcode not in ("dot", "convolution") and not (i.opcode == "custom-call" and LIBRARY_PRODUCT.search(i.attributes)):
            return 0
        x, y = (arrays(computation.body[name].shape)[0][1] for name in i.operands[:2])
        out = arrays(i.shape)[0][1]
        if i.opcode == "dot":
            return 2 * math.prod(out) * math.prod(x[int(n)] for n in i.attribute("lhs_contracting_dims"))
        if i.opcode == "convolution":
            return convolution_flops(i, x, y, out)
        # A library's product, whichever way round: |x| |y| |out| = (batch m k) (batch k n) (batch m n).
        return 2 * math.isqrt(math.prod(x) * math.prod(y) * math.prod(out) // math.prod(out[:-2]))

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


def convolution_flops(i: Instruction, x: tuple[int, ...], y: tuple[int, ...], out: tuple[int, ...]) -> int:
    """2 for every number of the picture that a number of the kernel meets, for each of an output's features (XLA makes of
    products, too, convolutions, and of their batch axes padded windows that meet one entry each)."""
    left, right, result = re.findall(r"[^_\->]+", i.attribute("dim_labels")[0])
    window = dict(re.findall(r"(\w+)=(\S+)", (re.search(r"window=\{(.*?)\}", i.attributes) or ["", ""])[1]))

    def of_each(key: str, default: int) -> list[int]:  # pad=1_2x0_0 -> [1, 0]: the padding behind follows from the sizes
        return [int(word.split("_")[0]) for word in window[key].split("x")] if key in window else [default] * len(spatial)

    spatial = [label for label in left if label.isdigit()]
    meetings = math.prod(
        _meetings(out[result.index(label)], x[left.index(label)], *(of_each(key, default)[int(label)] for key, default in WINDOW))
        for label in spatial
    )
    return 2 * out[result.index("b")] * out[result.index("f")] * y[right.index("i")] * meetings


WINDOW = (("size", 1), ("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))


def _meetings(outputs: int, inputs: int, size: int, stride: int, pad: int, spread: int, kernel_spread: int) -> int:
    """Along one axis: the pairs of an output and a number of the kernel that meets an input, not padding or a gap."""
    shared = math.gcd(stride, spread)
    period = spread // shared
    found = 0
    for at in range(-pad, -pad + size * kernel_spread, kernel_spread):  # of the first output: p stands at p stride + at
        if at % shared == 0:
            low, high = max(0, -(at // stride)), min(outputs - 1, ((inputs - 1) * spread - at) // stride)
            on_input = -(at // shared) * pow(stride // shared, -1, period) % period  # every period-th output from here
            found += max(0, (high - on_input) // period - (low - 1 - on_input) // period)
    return found
