"""What a run would need and do on chips that need not be there: its real train step, compiled ahead of time."""

from clipjax.plan.figures import Plan, make_plan, setting, with_largest_batch
from clipjax.plan.program import abstract_batch, compile_step, lower_step

__all__ = ["Plan", "abstract_batch", "compile_step", "lower_step", "make_plan", "setting", "with_largest_batch"]
