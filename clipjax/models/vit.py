"""The image tower: a vision transformer that can be CLIP's (2103.00020), SigLIP's (2303.15343) or CoCa's (2205.01917)."""

import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from clipjax.config import ImageTower
from clipjax.models.layers import Block, How, LayerNorm, Linear, Scope, normal
from clipjax.models.pooling import AttentionalPooler, AttentionPooling


class ViT(nnx.Module):
    def __init__(self, cfg: ImageTower, scope: Scope) -> None:
        self.cfg = cfg
        self.dtype = scope.dtype
        d, p = cfg.width, cfg.patch_size
        # CLIP leaves the convolution to PyTorch, whose uniform law has a variance of a third of 1 / fan-in.
        self.patch = Linear(scope / "patch", (p, p, 3), (d,), std=(3 * 3 * p * p) ** -0.5, bias=cfg.patch_bias)
        self.class_token = scope.param("class_token", normal(d**-0.5), d) if cfg.class_token else None
        rows = cfg.patches + cfg.class_token
        self.positions = scope.param("positions", normal(d**-0.5), rows, d) if cfg.positions == "learned" else None
        self.pre_norm = LayerNorm(scope / "pre_norm", d, cfg.norm_eps) if cfg.pre_norm else None
        shape = dict(width=d, depth=cfg.depth, heads=cfg.heads, mlp_dim=cfg.mlp_dim)
        blocks = (scope / "blocks").stacked(cfg.depth)
        self.blocks = Block(blocks, **shape, activation=cfg.activation, eps=cfg.norm_eps, causal=False)
        e = cfg.embed_dim
        self.norm = LayerNorm(scope / "norm", e if cfg.pool == "single" else d, cfg.norm_eps)
        self.map = AttentionPooling(cfg, scope / "map") if cfg.pool == "map" else None
        pooler = functools.partial(AttentionalPooler, width=e, heads=cfg.pool_heads, eps=cfg.norm_eps)
        self.pooler = pooler(scope / "pooler", queries=cfg.queries, context=d) if cfg.attentional else None
        own, context = cfg.pool in ("cascade", "parallel"), e if cfg.pool == "cascade" else d
        self.contrastive = pooler(scope / "contrastive", queries=1, context=context) if own else None
        pooled = e if cfg.attentional else d
        project = None if e is None else Linear(scope / "projection", (pooled,), (e,), std=pooled**-0.5, bias=False)
        self.projection = project

    def __call__(
        self, images: UInt8[Array, "b s s 3"], keys: Key[Array, " b"] | None, how: How, seen: bool = False
    ) -> tuple[Float[Array, "b e"], Array | None]:
        """Pictures [b, s, s, 3] in 0..255 -> embeddings, not normalised; and what a decoder sees of each [b, m, c], if asked
        for. `keys`, one an example, turns patch dropout on.
        """
        # Cut up as bytes, the least there is to move, and all numbers of a patch in one axis, which needs no padding on a TPU.
        side = self.cfg.patch_size
        patches = einops.rearrange(images, "b (y p) (x q) c -> b (y x) (p q c)", p=side, q=side)
        parts = jax.tree.map(lambda x: how.split(x, self.cfg.patches), (patches, keys))
        x = how.layers(self.blocks, how.each(self.embed, *parts))
        return how.join(how.each(functools.partial(self.pool, seen=seen), x))

    def embed(self, patches: UInt8[Array, "b n f"], keys: Key[Array, " b"] | None) -> Float[Array, "b t d"]:
        cfg = self.cfg
        mean, std = (np.tile(np.float32(c), cfg.patch_size**2)[None, None] for c in (cfg.mean, cfg.std))
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

    def pool(self, x: Float[Array, "b t d"], seen: bool) -> tuple[Float[Array, "b e"], Array | None]:
        if self.cfg.pool == "cls":
            z, tokens = self.norm(x[:, 0]), self.norm(x[:, 1:]) if seen else None
        elif self.cfg.pool == "single":
            x = self.norm(self.pooler(x))
            z, tokens = x[:, 0], x[:, 1:]
        else:
            tokens = x = self.norm(x)
            if self.pooler is not None:
                tokens = self.pooler(x)
                z = self.contrastive(tokens if self.cfg.pool == "cascade" else x)[:, 0]
            else:
                z = x.mean(1) if self.map is None else self.map(x)
        return z if self.projection is None else self.projection(z), tokens if seen else None


def drop_patches(x: Float[Array, "b n d"], keys: Key[Array, " b"], rate: float) -> Float[Array, "b m d"]:
    """A random m = n (1 - rate) of each example's patches, drawn by its own key (FLIP, 2212.00794)."""
    n = x.shape[1]
    keep = max(1, round(n * (1 - rate)))
    noise = jax.vmap(lambda key: jax.random.uniform(key, (n,)))(keys)
    kept = jnp.argsort(-noise)[:, :keep]  # top_k would gather the noise of the whole batch on every device
    return jnp.take_along_axis(x, kept[..., None], axis=1)


def sincos2d(cfg: ImageTower) -> Float[Array, "n d"]:
    """Fixed sine and cosine positions on the grid of patches (2205.01580); a class token's row is zero."""
    side = cfg.image_size // cfg.patch_size
    y, x = np.mgrid[:side, :side].reshape(2, -1, 1)
    omega = 10000.0 ** -np.linspace(0, 1, cfg.width // 4)[None]
    table = np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)], axis=1)
    return jnp.asarray(np.pad(table, ((int(cfg.class_token), 0), (0, 0))), jnp.float32)
