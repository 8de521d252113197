"""Losses over the global batch: pure functions of unit vectors, logit scale, bias and the batch's mesh axes."""

from clipjax.losses.batch import mean
from clipjax.losses.caption import caption_loss, caption_nll, token_nll
from clipjax.losses.flops import Sizes, term_flops
from clipjax.losses.matryoshka import matryoshka
from clipjax.losses.objective import objective
from clipjax.losses.pairwise import Axis, pairwise_cross_entropy, pairwise_logsumexp, pairwise_softplus
from clipjax.losses.regularizers import alignment, barlow, cross_uniformity, cyclip, preserved, uniformity
from clipjax.losses.rows import HeadRows, Rows, Shared, TermResult, over_heads, over_pairs
from clipjax.losses.sigmoid import siglip_loss
from clipjax.losses.softmax import clip_loss, decoupled_loss, hard_negative_loss
from clipjax.losses.sogclr import sogclr_loss
from clipjax.losses.targets import cwcl_loss, distillation_loss, multi_positive_loss
from clipjax.losses.terms import TERMS
from clipjax.losses.views import multi_view_loss, prototype_loss, swap_loss, symile_loss

__all__ = [
    "TERMS", "Axis", "HeadRows", "Rows", "Shared", "Sizes", "TermResult", "alignment", "barlow", "caption_loss",
    "caption_nll", "clip_loss", "cross_uniformity", "cwcl_loss", "cyclip", "decoupled_loss", "distillation_loss",
    "hard_negative_loss", "matryoshka", "mean", "multi_positive_loss", "multi_view_loss", "objective", "over_heads",
    "over_pairs", "pairwise_cross_entropy", "pairwise_logsumexp", "pairwise_softplus", "preserved", "prototype_loss",
    "siglip_loss", "sogclr_loss", "swap_loss", "symile_loss", "term_flops", "token_nll", "uniformity",
]  # fmt: skip
