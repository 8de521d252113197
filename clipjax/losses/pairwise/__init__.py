"""The streamed primitives: reductions over all pairs of the global batch, exact, in memory linear in the local batch.

Each works on this device's shards of two sets of unit vectors, inside `shard_map` over `axis`, or on everything where axis is
None. Values and gradients are those of the dense matrix of cosines, which never exists: tiles are made, reduced and dropped
(clipjax.losses.pairwise.tiles), and made again for the gradient (METHODS E.6). Operands are float32 at the highest precision,
or bfloat16 with float32 accumulation where `dtype` says so.

Differentiate outside `shard_map` in either mode, or inside it with check_vma=True. Inside it with check_vma=False a gradient is
wrong, here as for every function whose result is the same on all devices (METHODS 0.3), and can't be told apart.
"""

from clipjax.losses.pairwise.axes import Axis
from clipjax.losses.pairwise.cross_entropy import pairwise_cross_entropy
from clipjax.losses.pairwise.logsumexp import Reduced, pairwise_logsumexp
from clipjax.losses.pairwise.softplus import pairwise_softplus

__all__ = ["Axis", "Reduced", "pairwise_cross_entropy", "pairwise_logsumexp", "pairwise_softplus"]
