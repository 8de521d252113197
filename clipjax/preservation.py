"""Which of a run's checkpoints are kept."""

import math
from collections.abc import Mapping, Sequence

from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.checkpoint_managers import PolicyCheckpointInfo, PreservationContext, PreservationPolicy

from clipjax import config


class Preservation(PreservationPolicy):
    """Keeps the newest checkpoints, those that train.keep_every wants for good, and the one with the best metric.

    Orbax asks at each save, on every process. A checkpoint is written before it is evaluated, so its metrics are not in it.
    """

    def __init__(self, cfg: config.Train) -> None:
        kept: list[PreservationPolicy] = [policies.LatestN(cfg.keep)]
        if cfg.keep_every:
            kept.append(policies.EveryNSteps(cfg.keep_every))
        self._others = policies.AnyPreservationPolicy(kept)
        self._metric = cfg.best or ""  # which no metric is called
        self._values: dict[int, float] = {}

    def note(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Takes the metrics of evaluations of a step under the names that train.best may have."""
        value = metrics.get(self._metric)
        if value is not None and math.isfinite(value):  # None stands for NaN in metrics.jsonl
            self._values[step] = value

    def should_preserve(self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext) -> Sequence[bool]:
        """Whether each checkpoint is kept. Of those with equally good metrics it is the newest."""
        values = [(self._value(found), found.step) for found in checkpoints]
        _, best = max(((value, step) for value, step in values if value is not None), default=(None, None))
        others = self._others.should_preserve(checkpoints, context=context)
        return [kept or found.step == best for kept, found in zip(others, checkpoints, strict=True)]

    def _value(self, found: PolicyCheckpointInfo) -> float | None:
        """A checkpoint of release 0.2 or earlier has its metrics with it, `found.metrics`."""
        return self._values.get(found.step, (found.metrics or {}).get(self._metric))
