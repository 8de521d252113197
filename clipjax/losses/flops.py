"""The FLOPs of the objective's terms in a training step, counted by hand: what a loss needs. A multiply-add counts 2."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from clipjax import config


class Sizes(NamedTuple):
    """What the FLOPs of a term depend on."""

    pairs: int  # B, of the global batch
    captions: int  # K, of an image
    width: int  # d, of the embeddings
    teacher: int | None = None  # width of a teacher's embeddings
    views: int = 1  # V, of an image
    heads: Mapping[str, int] = {}  # widths of the heads
    classes: int = 0  # model.classes.count

    def taken(self, term: config.Term) -> float:
        """How many pairs of a view and a caption, two views or two captions a term takes. A head's counts by its width."""
        if not isinstance(term, config.Pairs):
            return self.views * self.captions
        width = sum(self.heads.get(head, self.width) if head else self.width for head in term.heads) / self.width
        return len(term.pairs(self.views, self.captions)) * width

    @property
    def one_pass(self) -> float:
        """One pass over all pairs with one caption: 8 B^2 d.

        That is 4 B^2 d multiply-adds: B^2 d for the cosines, B^2 d to recompute them in the backward pass, and B^2 d for the
        gradient of each side.
        """
        return 8.0 * self.pairs**2 * self.width


def term_flops(term: config.Term, sizes: Sizes) -> float:
    """FLOPs of one term over the global batch. 0 for a class that was registered without `flops`."""
    count = term.implementation.flops
    return 0.0 if count is None else float(count(term, sizes))


def of_prefixes(term: Any, sizes: Sizes) -> float:
    """A pass over all pairs for each prefix."""
    return sizes.taken(term) * sum(n / sizes.width for n in term.prefixes or (sizes.width,)) * sizes.one_pass


def of_sigmoid(term: config.Sigmoid, sizes: Sizes) -> float:
    """Three quarters of a pass: pairs are independent, so the forward pass gives the gradients too, and nothing is recomputed."""
    return 0.75 * of_prefixes(term, sizes)


def of_hard_negative(term: config.HardNegative, sizes: Sizes) -> float:
    """Two passes, at two scales."""
    return (2 if term.beta else 1) * of_prefixes(term, sizes)


def of_pairs(term: Any, sizes: Sizes) -> float:
    """A pass for each pair of a view and a caption, or what else the term takes."""
    return sizes.taken(term) * sizes.one_pass


def of_together(term: config.Symile | config.MultiView, sizes: Sizes) -> float:
    """A pass for each view and caption; of infonce for each two in either order, and for each with itself."""
    pairs = term.pairs(sizes.views, sizes.captions)
    count = len({*itertools.chain(*pairs)})
    passes = count**2 if isinstance(term, config.MultiView) and term.form == "infonce" else count
    return passes / len(pairs) * of_pairs(term, sizes)


def of_barlow(term: config.Barlow, sizes: Sizes) -> float:
    """A Gram matrix of each pair and head."""
    widths = (sizes.heads.get(head or "", sizes.width) for head in term.heads)
    return 6.0 * sizes.pairs * len(term.pairs(sizes.views, sizes.captions)) * sum(w * w for w in widths)


def of_swap(term: config.Swap, sizes: Sizes) -> float:
    """A distillation, and 4 r - 2 quarters of a pass without gradient. To prototypes: their products with both sides."""
    of_one = 12.0 * sizes.pairs * sizes.classes * sizes.width if term.prototypes else (term.rounds + 1) * sizes.one_pass
    return sizes.taken(term) * of_one


def of_metric(term: config.MannWhitney | config.Mixup, sizes: Sizes) -> float:
    """Three quarters of a pass for each direction of Mann-Whitney, as of the sigmoid; a pass for each side that Mixup mixes."""
    passes = 1.5 if isinstance(term, config.MannWhitney) else 2 if term.mix == "both" else 1
    return passes * of_pairs(term, sizes)


def of_main_caption(term: Any, sizes: Sizes) -> float:
    """A pass for the main caption alone."""
    return sizes.one_pass


def of_cwcl(term: config.Cwcl, sizes: Sizes) -> float:
    """A pass, the mean of q p^T, and the products with it."""
    return sizes.taken(term) * (sizes.one_pass + 8.0 * sizes.pairs * sizes.width**2)


def of_cyclip(term: config.Cyclip, sizes: Sizes) -> float:
    """Three Gram matrices."""
    return sizes.taken(term) * 18.0 * sizes.pairs * sizes.width**2


def of_distillation(term: config.Distillation, sizes: Sizes) -> float:
    """A pass, and half a pass over the teacher's cosines, which have no gradient."""
    return sizes.taken(term) * sizes.one_pass * (1 + (term.classes or sizes.teacher or sizes.width) / (2 * sizes.width))


def of_uniformity(term: config.Uniformity, sizes: Sizes) -> float:
    """Three quarters of a pass for each view, and for each caption: one gradient serves both sides."""
    return (sizes.views + sizes.captions) * 0.75 * sizes.one_pass


def of_classify(term: config.Classify, sizes: Sizes) -> float:
    """A pass over all views (captions) and the classes that are drawn."""
    rows = sizes.pairs * (sizes.views if term.side == "image" else sizes.captions)
    return 8.0 * rows * term.sampled * sizes.classes * sizes.heads.get(term.head or "", sizes.width)


def none(term: Any, sizes: Sizes) -> float:
    """Only sums over the rows. A captioning term's product with the vocabulary is counted with the decoder."""
    return 0.0
