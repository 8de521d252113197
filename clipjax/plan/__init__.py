"""What a run needs and does on chips that this machine need not have: its real train step, compiled ahead of time."""

from clipjax.plan.figures import Plan, make_plan, with_largest_batch
from clipjax.plan.program import abstract_batch, compile_run, lower_step
from clipjax.plan.target import Target, make_target

__all__ = ["Plan", "Target", "abstract_batch", "compile_run", "lower_step", "make_plan", "make_target", "with_largest_batch"]
