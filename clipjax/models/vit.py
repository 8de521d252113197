"""The image tower: a vision transformer. It can be CLIP's (2103.00020), SigLIP's (2303.15343) or CoCa's (2205.01917)."""

import functools
import math

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from clipjax.config import ImageTower
from clipjax.config.towers import held_layers, locked_layers
from clipjax.models import lora
from clipjax.models.block import Block
from clipjax.models.facts import BlockShape, Layout, TowerFacts
from clipjax.models.layers import LayerNorm, Linear, Scope, normal
from clipjax.models.pooling import POOLERS, AttentionalPooler, pool_flops, pool_kept
from clipjax.models.runner import Runner


class ViT(nnx.Module):
    """From images, uint8 [b, s, s, 3], to embeddings [b, e], not normalised."""

    def __init__(self, cfg: ImageTower, scope: Scope) -> None:
        self.cfg = cfg
        self.dtype = scope.dtype
        d, p = cfg.width, cfg.patch_size
        # CLIP keeps PyTorch's initialisation of the convolution: uniform, with variance 1 / (3 fan-in).
        self.patch = Linear(scope / "patch", (p, p, 3), (d,), std=(3 * 3 * p * p) ** -0.5, bias=cfg.patch_bias)
        self.class_token = scope.param("class_token", normal(d**-0.5), d) if cfg.class_token else None
        rows = cfg.patches + cfg.class_token
        self.positions = scope.param("positions", normal(d**-0.5), rows, d) if cfg.positions == "learned" else None
        self.pre_norm = LayerNorm(scope / "pre_norm", d, cfg.norm_eps) if cfg.pre_norm else None
        shape = dict(width=d, depth=cfg.depth, heads=cfg.heads, mlp_dim=cfg.mlp_dim)
        blocks = (scope / "blocks").stacked(cfg.depth, cfg.lora)
        self.blocks = Block(blocks, **shape, activation=cfg.activation, eps=cfg.norm_eps, causal=False)
        e = cfg.embed_dim or d
        self.norm = LayerNorm(scope / "norm", e if cfg.pool == "single" else d, cfg.norm_eps)
        if cfg.pool in POOLERS:  # the attribute's name is the path of its parameters
            setattr(self, cfg.pool, POOLERS[cfg.pool](cfg, scope / cfg.pool))
        pooler = functools.partial(AttentionalPooler, width=e, heads=cfg.pool_heads, eps=cfg.norm_eps)
        self.pooler = pooler(scope / "pooler", queries=cfg.queries, context=d) if cfg.attentional else None
        own, context = cfg.pool in ("cascade", "parallel"), e if cfg.pool == "cascade" else d
        self.contrastive = pooler(scope / "contrastive", queries=1, context=context) if own else None
        pooled = cfg.pooled_width
        project = functools.partial(Linear, scope / "projection", (pooled,), (e,), std=pooled**-0.5, bias=cfg.projection_bias)
        self.projection = None if cfg.embed_dim is None else project()

    @jax.named_scope("image")
    def __call__(
        self,
        images: UInt8[Array, "b s s 3"],
        keys: Key[Array, " b"] | None,
        runner: Runner,
        tokens: bool = False,
        features: bool = False,
    ) -> tuple[Float[Array, "b e"], Array | None, Array | None]:
        """Images [b, s, s, 3] in 0..255 -> embeddings, not normalised. With `tokens`, also the tokens [b, m, c] that a decoder
        attends to; with `features`, vectors [b, d] before the projection. `keys`, one an example, turn patch dropout on.
        """
        # Split into patches as bytes, so that the fewest bytes move. All numbers of a patch are one axis: no padding on a TPU.
        # What fills no patch is left out at the right and at the bottom, as a convolution with this stride does.
        side, whole = self.cfg.patch_size, self.cfg.side * self.cfg.patch_size
        patches = einops.rearrange(images[:, :whole, :whole], "b (y p) (x q) c -> b (y x) (p q c)", p=side, q=side)
        chunks = jax.tree.map(lambda x: runner.to_chunks(x, self.cfg.patches), (patches, keys))
        x = runner.layers(self.blocks, runner.around_layers(ViT.embed, self, *chunks), locked=locked_layers(self.cfg))
        pooled = runner.around_layers(functools.partial(ViT.pool, with_tokens=tokens, features=features), self, x)
        return runner.from_chunks(pooled, len(images))

    def embed(self, patches: UInt8[Array, "b n f"], keys: Key[Array, " b"] | None) -> Float[Array, "b t d"]:
        cfg = self.cfg
        mean, std = (np.tile(np.asarray(c, np.float32), cfg.patch_size**2)[None, None] for c in (cfg.mean, cfg.std))
        pixels = ((patches.astype(jnp.float32) / 255 - mean) / std).astype(self.dtype)
        x = self.patch(einops.rearrange(pixels, "b n (p q c) -> b n p q c", p=cfg.patch_size, q=cfg.patch_size))
        positions = sincos2d(cfg) if self.positions is None else self.positions[...]
        if self.class_token is not None:
            token = self.class_token[...] + positions[0]
            positions = positions[1:]
        x = x + positions.astype(self.dtype)[None]
        if keys is not None and cfg.patch_dropout:
            x = drop_patches(x, keys, cfg.patch_dropout)
        if self.class_token is not None:
            x = jnp.concatenate([jnp.broadcast_to(token.astype(self.dtype), (len(x), 1, cfg.width)), x], axis=1)
        return x if self.pre_norm is None else self.pre_norm(x)

    def pool(
        self, x: Float[Array, "b t d"], with_tokens: bool, features: bool
    ) -> tuple[Float[Array, "b e"], Array | None, Array | None]:
        if self.cfg.pool == "cls":
            z, tokens = self.norm(x[:, 0]), self.norm(x[:, 1:]) if with_tokens else None
        elif self.pooler is not None and self.contrastive is None:  # "single"
            x = self.norm(self.pooler(x))
            z, tokens = x[:, 0], x[:, 1:]
        elif self.cfg.norm_pooled:
            tokens = self.norm(x[:, self.cfg.class_token :]) if with_tokens else None
            z = self.norm(getattr(self, self.cfg.pool)(x))
        else:
            x = self.norm(x)
            tokens = x[:, self.cfg.class_token :]
            if self.pooler is not None and self.contrastive is not None:
                tokens = self.pooler(x)
                z = self.contrastive(tokens if self.cfg.pool == "cascade" else x)[:, 0]
            else:
                z = getattr(self, self.cfg.pool)(x)
        projected = z if self.projection is None else self.projection(z)
        return projected, tokens if with_tokens else None, z if features else None


def drop_patches(x: Float[Array, "b n d"], keys: Key[Array, " b"], rate: float) -> Float[Array, "b m d"]:
    """A random subset, m = n (1 - rate), of each example's patches, drawn by its own key (FLIP, 2212.00794)."""
    n = x.shape[1]
    keep = kept_patches(n, rate)
    noise = jax.vmap(lambda key: jax.random.uniform(key, (n,)))(keys)
    kept = jnp.argsort(-noise)[:, :keep]  # top_k would gather the global batch's noise on every device
    return jnp.take_along_axis(x, kept[..., None], axis=1)


def kept_patches(n: int, rate: float) -> int:
    """The number of n patches that dropping a share of them leaves: at least one."""
    return max(1, round(n * (1 - rate)))


def sincos2d(cfg: ImageTower) -> Float[Array, "n d"]:
    """Fixed sine and cosine positions on the grid of patches (2205.01580). A class token's row is zero."""
    y, x = np.mgrid[: cfg.side, : cfg.side].reshape(2, -1, 1)
    omega = 10000.0 ** -np.linspace(0, 1, cfg.width // 4)[None]
    table = np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)], axis=1)
    return jnp.asarray(np.pad(table, ((int(cfg.class_token), 0), (0, 0))), jnp.float32)


def facts(cfg: ImageTower) -> TowerFacts:
    """The facts of the image tower, for one image in training: with patch dropout."""
    tokens, e = kept_patches(cfg.patches, cfg.patch_dropout) + cfg.class_token, cfg.embed_dim or 0
    layer = BlockShape(tokens, cfg.width, cfg.heads, cfg.mlp_dim, cfg.activation, cfg.lora)
    patches = 2 * cfg.patches * 3 * cfg.patch_size**2 * cfg.width  # of all patches: they are dropped afterwards
    projection = 2 * (e if cfg.attentional else cfg.width) * e
    pool_heads = {"pool_heads": cfg.pool_heads} if cfg.attentional else {}
    return TowerFacts(
        flops=patches + cfg.depth * Block.flops(layer) + _pool_flops(cfg, tokens) + projection,
        depth=cfg.depth,
        held=held_layers(cfg),
        tokens=tokens,
        layer_weights=Block.weights(layer),
        kept=functools.partial(_kept, cfg, layer),
        tensor_sizes={"heads": cfg.heads, "mlp_dim": cfg.mlp_dim} | pool_heads,
        adapters=cfg.depth * lora.flops(layer),
        after_blocks=frozenset({"norm", "pooler", "contrastive", "projection", *POOLERS}),
    )


def _pool_flops(cfg: ImageTower, tokens: int) -> int:
    if cfg.pool in POOLERS:
        return POOLERS[cfg.pool].flops(cfg, tokens)
    if not cfg.attentional:
        return 0
    width = cfg.embed_dim or cfg.width
    flops = pool_flops(cfg.queries, tokens, cfg.width, width)
    if cfg.pool == "cascade":
        flops += pool_flops(1, cfg.queries, width, width)
    elif cfg.pool == "parallel":
        flops += pool_flops(1, tokens, cfg.width, width)
    return flops


def _kept(cfg: ImageTower, layer: BlockShape, policy: str, layout: Layout) -> int:
    pooler = 0
    if cfg.pool in POOLERS:
        pooler = POOLERS[cfg.pool].kept(policy, layout, cfg, layer.tokens)
    elif cfg.attentional:
        pooler = pool_kept(policy, layout, layer.tokens, cfg.width)
    return math.ceil(held_layers(cfg) * Block.kept(policy, layout, layer) + pooler)
