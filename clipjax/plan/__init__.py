"""What a run would need and do on chips that need not be there: its real train step, compiled ahead of time."""

from clipjax.plan.program import abstract_batch, compile_step, lower_step

__all__ = ["abstract_batch", "compile_step", "lower_step"]
