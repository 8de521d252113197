"""The transformer block of both towers. clipjax.models.runner runs a stack of them."""

from flax import nnx
from jaxtyping import Array, Bool, Float

from clipjax.config import Activation
from clipjax.models import lora
from clipjax.models.attention import AttentionMask, Cache, SelfAttention
from clipjax.models.facts import BlockShape, Layout
from clipjax.models.layers import MLP, LayerNorm, Scope


class Block(nnx.Module):
    """A pre-norm transformer block. Built in a stacked scope it holds every layer of a tower, which `Runner.layers` runs."""

    def __init__(
        self, scope: Scope, *, width: int, depth: int, heads: int, mlp_dim: int, activation: Activation, eps: float, causal: bool
    ) -> None:
        # CLIP's initialisation (2103.00020, and openai/CLIP model.py `initialize_parameters`).
        std, out_std = width**-0.5, width**-0.5 * (2 * depth) ** -0.5
        self.norm1 = LayerNorm(scope / "norm1", width, eps)
        self.attention = SelfAttention(scope / "attention", width, heads, causal=causal, std=std, out_std=out_std)
        self.norm2 = LayerNorm(scope / "norm2", width, eps)
        self.mlp = MLP(scope / "mlp", width, mlp_dim, activation, std=(2 * width) ** -0.5, out_std=out_std)

    def __call__(self, x: Float[Array, "b t d"], mask: AttentionMask | None = None) -> Float[Array, "b t d"]:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))

    def step(self, x: Float[Array, "b n d"], cache: Cache, at: Array, mask: Bool[Array, "b n 1 t"]) -> tuple[Array, Cache]:
        """The same for one token of each caption, at position `at`; also that token's keys and values."""
        y, new = self.attention.step(self.norm1(x), cache, at, mask)
        x = x + y
        return x + self.mlp(self.norm2(x)), new

    @staticmethod
    def flops(shape: BlockShape) -> int:
        """FLOPs of a forward pass of one layer on one example."""
        kernels = SelfAttention.flops(shape.tokens, shape.width) + MLP.flops(shape.tokens, shape.width, shape.mlp_dim)
        return kernels + lora.flops(shape)

    @staticmethod
    def weights(shape: BlockShape) -> int:
        """Numbers in the kernels of one layer, and in their adapters."""
        return 4 * shape.width**2 + 2 * shape.width * shape.mlp_dim + lora.weights(shape)

    @staticmethod
    def kept(policy: str, layout: Layout, shape: BlockShape) -> float:
        """Bytes of one layer kept for the backward pass, of one example. Every policy but `none` keeps the layer's input."""
        x = 0 if policy == "none" else layout.bytes(shape.tokens, shape.width)
        parts = SelfAttention.kept(policy, layout, shape) + MLP.kept(policy, layout, shape)
        return x + parts + lora.kept(policy, layout, shape)
