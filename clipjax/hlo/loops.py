"""How often a loop runs: the compiler says so, or the integers that its condition reads are followed through the program."""

import functools
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from clipjax.hlo.text import Computation, Instruction, called

MOST_TRIPS = 100_000  # of a loop whose counter has to be followed, because the compiler does not give the count

# Operations on integers; a loop's counter and its bound are made of these.
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
SAME_VALUE = ("copy", "bitcast", "convert", "reshape", "opt-barrier")  # give their operand on

# (parameter number, element of it where it is a tuple) -> an integer, or None if it is not known.
Known = Callable[[int, int | None], Any]


class Integers:
    """The integers in a program that are known without running it."""

    def __init__(self, computations: Mapping[str, Computation]) -> None:
        self.computations = computations

    def trip_count(self, name: str, loop: Instruction, known: Known) -> int | None:
        """How often a loop of computation `name` runs; None: not known."""
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(found[1])
        (condition,), (body,) = loop.attribute("condition"), loop.attribute("body")
        state = self.of_operands(name, loop, known)
        for trip in range(MOST_TRIPS):
            goes_on = self.value(condition, self.computations[condition].root, known=state)
            if not isinstance(goes_on, int):
                return None
            if not goes_on:
                return trip
            state = functools.cache(functools.partial(self._after, body, state))
        return None

    def _after(self, body: str, before: Known, parameter: int, element: int | None) -> Any:
        """An element of a loop's state, one iteration after `before`."""
        return self.value(body, self.computations[body].root, element=element, known=before)

    def of_operands(self, name: str, i: Instruction, known: Known, first: int = 0) -> Known:
        """What is known of the parameters of a called computation: they are the operands of the call `i`, from `first` on."""
        return lambda parameter, element: self.value(name, i.operands[first + parameter], element=element, known=known)

    def in_loop(self, name: str, loop: Instruction, known: Known) -> Known:
        """What is known of the state of a loop in every iteration."""
        return lambda _, element: self.value(name, loop.name, element=element, known=known)

    def value(self, name: str, instruction: str, *, known: Known, element: int | None = None) -> Any:
        """The value of an instruction of computation `name`, or of an element of its tuple. None: not a known integer."""
        i = self.computations[name].body[instruction]

        def operand(n: int, element: int | None = None) -> Any:
            return self.value(name, i.operands[n], known=known, element=element)

        if i.opcode == "constant":
            booleans = {"true": 1, "false": 0}
            return booleans.get(i.inside, int(i.inside) if re.fullmatch(r"-?\d+", i.inside) else None)
        if i.opcode == "parameter":
            return known(int(i.inside), element)
        if i.opcode == "get-tuple-element":
            return operand(0, i.number("index"))
        if i.opcode == "tuple" and element is not None:
            return operand(element)
        if i.opcode in SAME_VALUE:
            return operand(0, element)
        if i.opcode in ("fusion", "call"):
            (inner,) = called(self.computations, i)
            return self.value(inner, self.computations[inner].root, known=self.of_operands(name, i, known), element=element)
        if i.opcode == "while":  # still known after the loop, if every iteration gives the element on unchanged
            (body,) = i.attribute("body")
            given_on = self.value(body, self.computations[body].root, known=lambda _, n: ("element", n), element=element)
            return operand(0, element) if given_on == ("element", element) else None
        if i.opcode in ARITHMETIC or i.opcode == "compare":
            a, b = operand(0), operand(1)
            if not (isinstance(a, int) and isinstance(b, int)):
                return None
            return ARITHMETIC[i.opcode](a, b) if i.opcode in ARITHMETIC else int(COMPARISONS[i.attribute("direction")[0]](a, b))
        return None
