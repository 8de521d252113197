"""The image tower: a vision transformer that can be CLIP's (2103.00020) or SigLIP's (2303.15343)."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from clipjax.config import ImageTower
from clipjax.models.layers import MLP, Block, How, LayerNorm, Linear, Scope, normal


class ViT(nnx.Module):
    def __init__(self, cfg: ImageTower, scope: Scope) -> None:
        self.cfg = cfg
        self.dtype = scope.dtype
        d, p = cfg.width, cfg.patch_size
        # CLIP leaves the convolution to PyTorch, whose uniform law has a variance of a third of 1 / fan-in.
        self.patch = Linear(scope / "patch", (p, p, 3), (d,), std=(3 * 3 * p * p) ** -0.5, bias=cfg.patch_bias)
        self.class_token = scope.param("class_token", normal(d**-0.5), d) if cfg.pool == "cls" else None
        rows = cfg.patches + (cfg.pool == "cls")
        self.positions = scope.param("positions", normal(d**-0.5), rows, d) if cfg.positions == "learned" else None
        self.pre_norm = LayerNorm(scope / "pre_norm", d, cfg.norm_eps) if cfg.pre_norm else None
        shape = dict(width=d, depth=cfg.depth, heads=cfg.heads, mlp_dim=cfg.mlp_dim)
        blocks = (scope / "blocks").stacked(cfg.depth)
        self.blocks = Block(blocks, **shape, activation=cfg.activation, eps=cfg.norm_eps, causal=False)
        self.norm = LayerNorm(scope / "norm", d, cfg.norm_eps)
        self.map = AttentionPooling(cfg, scope / "map") if cfg.pool == "map" else None
        project = cfg.embed_dim is not None
        self.projection = Linear(scope / "projection", (d,), (cfg.embed_dim,), std=d**-0.5, bias=False) if project else None

    def __call__(self, images: UInt8[Array, "b s s 3"], keys: Key[Array, " b"] | None, how: How) -> Float[Array, "b e"]:
        """Pictures [b, s, s, 3] in 0..255 -> embeddings, not normalised. `keys`, one an example, turns patch dropout on."""
        # Cut up as bytes, the least there is to move, and all numbers of a patch in one axis, which needs no padding on a TPU.
        side = self.cfg.patch_size
        patches = einops.rearrange(images, "b (y p) (x q) c -> b (y x) (p q c)", p=side, q=side)
        parts = jax.tree.map(lambda x: how.split(x, self.cfg.patches), (patches, keys))
        return how.join(how.each(self.pool, how.layers(self.blocks, how.each(self.embed, *parts))))

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

    def pool(self, x: Float[Array, "b t d"]) -> Float[Array, "b e"]:
        if self.cfg.pool == "cls":
            x = self.norm(x[:, 0])
        elif self.map is not None:
            x = self.map(self.norm(x))
        else:
            x = self.norm(x).mean(1)
        return x if self.projection is None else self.projection(x)


class AttentionPooling(nnx.Module):
    """SigLIP's pooling head: a learned probe attends to all tokens, then a residual MLP."""

    def __init__(self, cfg: ImageTower, scope: Scope) -> None:
        d, heads, std = cfg.width, (cfg.heads, cfg.width // cfg.heads), cfg.width**-0.5
        self.probe = scope.param("probe", normal(std), d)
        self.query = Linear(scope / "query", (d,), heads, std=std)
        self.key_value = Linear(scope / "key_value", (d,), (2, *heads), std=std)
        self.out = Linear(scope / "out", heads, (d,), std=std)
        self.norm = LayerNorm(scope / "norm", d, cfg.norm_eps)
        self.mlp = MLP(scope / "mlp", d, cfg.mlp_dim, cfg.activation, std=(2 * d) ** -0.5, out_std=std)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        query = self.query(self.probe[...].astype(x.dtype)[None, None])  # the same for every picture
        key, value = jnp.moveaxis(self.key_value(x), 2, 0)
        x = self.out(jax.nn.dot_product_attention(jnp.broadcast_to(query, (len(x), *query.shape[1:])), key, value))
        return (x + self.mlp(self.norm(x)))[:, 0]


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
    return jnp.asarray(np.pad(table, ((int(cfg.pool == "cls"), 0), (0, 0))), jnp.float32)
