"""The streamed primitives: reductions over all pairs of the global batch, exact, in memory linear in the local batch.

Each takes this device's shards of two sets of unit vectors, inside `shard_map` over `axis`, or all vectors where axis is None.
Values and gradients are those of the dense matrix of cosines. That matrix is never in memory: its tiles are computed, reduced and
dropped (clipjax.losses.pairwise.tiles), and computed again in the backward pass. Sums are float32. So are operands, at the
highest precision, unless `dtype` says bfloat16x3 (float32 in three passes) or bfloat16.

Differentiate outside `shard_map` in either mode, or inside it with check_vma=True. Inside it with check_vma=False the gradient is
wrong, as it is for every function whose result is replicated: the cotangent of such a result is then 1 / n of the true one on n
devices. A function can't detect this.
"""

from clipjax.losses.pairwise.axes import Axis
from clipjax.losses.pairwise.cross_entropy import pairwise_cross_entropy
from clipjax.losses.pairwise.logsumexp import Reduced, pairwise_logsumexp
from clipjax.losses.pairwise.softplus import pairwise_softplus

__all__ = ["Axis", "Reduced", "pairwise_cross_entropy", "pairwise_logsumexp", "pairwise_softplus"]
