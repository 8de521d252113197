"""What a compiled program does, read from the text of its optimised HLO: products, collectives, memory traffic, and cycles.

XLA's own cost analysis counts the body of a loop once; here it counts as often as it runs. All figures are for one device.
"""

from clipjax.hlo.cycles import Cycles, cycles
from clipjax.hlo.program import COLLECTIVES, Collective, Cost, cost
from clipjax.hlo.text import arrays, byte_count, parse

__all__ = ["COLLECTIVES", "Collective", "Cost", "Cycles", "arrays", "byte_count", "cost", "cycles", "parse"]
