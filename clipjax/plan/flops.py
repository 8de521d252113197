"""The FLOPs of a training step, counted by hand: what the model and its loss need, not what a compiler makes of it."""

from collections.abc import Collection

from clipjax import config
from clipjax.losses import Sizes, term_flops
from clipjax.metrics.flops import tower_flops


def step_flops(run: config.Run, trained: Collection[str], teacher: int | None = None) -> dict[str, float]:
    """FLOPs of one step on all devices, by part; a multiply-add counts 2. Parts: the towers, as in `metrics.model_flops`, and
    each term of the objective that has matrix products of its own.

    `trained`: paths of the trained parameters; `teacher`: the width of a teacher's embeddings. What remat or micro-batches
    recompute is not counted.
    """
    size, captions = run.train.batch_size, run.data.texts_per_image
    parts = tower_flops(run.model_in_use, trained, captions, run.embedded, run.data.views_per_image)
    towers = {part if part in ("decoder", "heads") else f"{part} tower": size * n for part, n in parts.items()}
    terms = [(i, term) for i, term in enumerate(run.objective) if term.weight]
    kinds = [term.kind for _, term in terms]
    names = [f"{term.kind} loss" + (f" {i}" if kinds.count(term.kind) > 1 else "") for i, term in terms]
    heads = {head.name: head.width for head in run.model.heads}
    classes = run.model.classes.count if run.model.classes else 0
    sizes = Sizes(size, captions, run.model.embed_dim, teacher, run.data.views_per_image, heads, classes)
    figures = [term_flops(term, sizes) for _, term in terms]
    return towers | {name: flops for name, flops in zip(names, figures, strict=True) if flops}
