"""The model's FLOPs, counted by hand, and what share of the chips' peak they are. Each tower counts its own (clip.facts)."""

from collections.abc import Collection, Sequence

import jax

from clipjax.chips import chip_of
from clipjax.config import Model, Run
from clipjax.config.towers import locked_layers
from clipjax.models import clip, heads
from clipjax.train.optimizer import trained_names


def run_flops(run: Run, params: clip.Params) -> float:
    """`model_flops` of a run. `params`: anything with its parameters' names."""
    trained = trained_names(run.optim_in_use.rules, params)
    return model_flops(run.model_in_use, trained, run.data.texts_per_image, run.embedded, run.data.views_per_image)


def model_flops(
    model: Model, trained: Collection[str] | None = None, captions: int = 1, embedded: str | None = None, views: int = 1
) -> float:
    """FLOPs of a training step per image; a multiply-add counts 2.

    For a tower whose blocks are trained they are 3 times the forward pass, and less if some are locked or have adapters;
    2 times if the gradient only passes through the blocks; once if nothing below its head is trained. `trained`: paths of the
    trained parameters, as `image/blocks/mlp/up/kernel`; None: all. `captions`, `views`: of an image.
    `embedded`: a tower that does not run (data.embeddings).

    Only dot products count, and not those that the backward pass recomputes. Causal attention counts in full, as it is computed
    and as others count it. Left out are the poolers' queries, which are computed once a batch, and the loss, 8 B d a pair (below
    1 % of B/16's step up to B = 256k).
    """
    return sum(tower_flops(model, trained, captions, embedded, views).values())


def tower_flops(
    model: Model, trained: Collection[str] | None = None, captions: int = 1, embedded: str | None = None, views: int = 1
) -> dict[str, float]:
    """`model_flops` of each tower: `image`, `text`, with its output projection `decoder`, and `heads` together."""
    found = {}
    for tower, facts in clip.facts(model).items():
        if tower == embedded:
            continue
        passes = _passes(model, tower, trained)
        own = (passes - 1) * facts.adapters if passes <= 2 else 0  # the gradient of adapters whose kernels get none
        found[tower] = float((captions if facts.per_caption else views) * (facts.flops * passes + own))
    counts = {"image": views, "text": captions}
    of_heads = sum(3.0 * n * heads.flops(model, side) for side, n in counts.items())
    return found | ({"heads": of_heads} if of_heads else {})


def _passes(model: Model, tower: str, trained: Collection[str] | None) -> float:
    """How many forward passes a training step costs. Locked layers cost one; layers with adapters two, for their kernels get no
    gradient."""
    if trained is None:
        return 3
    parts = {name.split("/")[1] for name in trained if name.startswith(tower + "/")}
    if "blocks" in parts:
        cfg = getattr(model, tower)
        share = 1 - locked_layers(cfg) / cfg.depth if tower != "decoder" else 1
        return 1 + share * (1 if tower != "decoder" and cfg.lora else 2)
    return 2 if parts - clip.facts(model)[tower].after_blocks else 1


def peak_flops(kind: str) -> float | None:
    """Dense bf16 FLOP/s of one JAX device of this `device_kind`; None where it is not known, as for CPUs and slices of a GPU."""
    chip = chip_of(kind)
    return None if chip is None else chip.flops / chip.devices


def mfu(flops_per_second: float, devices: Sequence[jax.Device]) -> float | None:
    """Model-FLOPs utilisation, 0 to 1: FLOPs the model needs against the bf16 peak of `devices`. None where that is not known."""
    peak = peak_flops(devices[0].device_kind)
    return None if peak is None else flops_per_second / (peak * len(devices))
