"""The FLOPs of a training step, counted by hand: what the model and its loss ask for, however a compiler goes about it."""

from collections.abc import Collection

from clipjax import config
from clipjax.metrics.flops import tower_flops


def step_flops(run: config.Run, trained: Collection[str], teacher: int | None = None) -> dict[str, float]:
    """By part, 2 a multiply-add, over all devices: the towers as in `metrics.model_flops`, and each term of the objective that
    has products of its own.

    `trained`: paths of the parameters that are; `teacher`: the width of a teacher's embeddings. What is made again by remat or
    micro-batches isn't counted.
    """
    size, captions = run.train.batch_size, run.data.captions_per_image
    parts = tower_flops(run.model_at_work, trained, captions)
    towers = {part if part == "decoder" else f"{part} tower": size * n for part, n in parts.items()}
    terms = [(i, term) for i, term in enumerate(run.objective) if term.weight]
    kinds = [term.kind for _, term in terms]
    names = [f"{term.kind} loss" + (f" {i}" if kinds.count(term.kind) > 1 else "") for i, term in terms]
    figures = [term_flops(term, size, captions, run.model.embed_dim, teacher) for _, term in terms]
    return towers | {name: flops for name, flops in zip(names, figures, strict=True) if flops}


def term_flops(term: config.Term, size: int, captions: int, width: int, teacher: int | None = None) -> float:
    """Of one term over a global batch of `size` pairs with so many captions each.

    A pass over all pairs, B^2 d multiply-adds of cosines, costs 8 B^2 d: the cosines, the same once more in the backward pass,
    and a product for each side's gradient.
    """
    every = 8.0 * size**2 * width  # one pass over all pairs, with both gradients
    match term:
        case config.Softmax() | config.Sigmoid() | config.Decoupled() | config.HardNegative():
            shares = [n / width for n in getattr(term, "prefixes", None) or (width,)]
            passes = 2 if isinstance(term, config.HardNegative) and term.beta else 1
            return captions * passes * sum(shares) * every
        case config.MultiPositive():
            return captions * every
        case config.Cwcl():
            return captions * (every + 8.0 * size * width**2)  # the mean of q p^T, and what is made of it
        case config.Cyclip():
            return captions * 18.0 * size * width**2  # three Gram matrices
        case config.Distillation():
            return captions * every * (1 + (teacher or width) / (2 * width))  # the teacher's have no gradient
        case config.Sogclr() | config.Isogclr():
            return every  # of the main caption
        case config.Uniformity():
            return (1 + captions) * 0.75 * every  # one gradient is both sides'
        case config.CrossUniformity():
            return captions * every
        case config.Alignment() | config.Caption():
            return 0.0  # words are the decoder's
