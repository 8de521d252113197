"""Attention by cuDNN, on NVIDIA GPUs in training: scores never reach the GPU's memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import einops
import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as of_jax
from jaxtyping import Array, Float

from clipjax import config

ASSUMED = 91300  # cuDNN 9.13, where none is installed


def check(model: config.Model, device: Any) -> None:
    """Raises ConfigError where the model asks for cuDNN, and it can't serve the model or doesn't run on this kind of device."""
    if model.attention != "cudnn":
        return
    kind, capability = device.device_kind, str(getattr(device, "compute_capability", "8.0"))  # AMD's is gfx90a, for example
    major = capability.partition(".")[0]
    runs = device.platform == "gpu" and major.isdecimal() and int(major) >= 8
    remedy = f"it runs on NVIDIA GPUs from Ampere on, and these devices are of kind {kind}: use exact"
    config.require(runs, "model.attention", "cudnn", remedy)
    config.require(model.dtype == "bfloat16", "model.dtype", model.dtype, "model.attention = cudnn needs bfloat16; or use exact")
    for name, part in {"image": model.image, "text": model.text, "decoder": model.decoder}.items():
        if part is None:
            continue
        width = (model.text if isinstance(part, config.Decoder) else part).width
        remedy = "makes heads of width {}: model.attention = cudnn needs a multiple of 8, at most 128; or use exact"
        head = width // part.heads
        config.require(head % 8 == 0 and head <= 128, f"model.{name}.heads", part.heads, remedy.format(head))


def attend(
    q: Float[Array, "b h t k"],
    k: Float[Array, "b h s k"],
    v: Float[Array, "b h s k"],
    causal: bool,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "b t h k"]:
    """`attention.attend` without a mask. Raises RuntimeError where JAX finds no cuDNN.

    JAX refuses odd numbers of tokens in training (0.10.2): they get one more, of zeros. No query sees it: where attention is
    causal it comes after all of them, and else the number of keys tells. What it gets is of no use.
    """
    keys = k.shape[2]
    even = (jnp.pad(x, ((0, 0), (0, 0), (0, x.shape[2] % 2), (0, 0))) for x in (q, k, v))
    q, k, v = (einops.rearrange(x, "b h t k -> b t h k") for x in even)
    real = jnp.full(len(k), keys, jnp.int32) if keys % 2 and not causal else None
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, key_value_seq_lengths=real, implementation=implementation)


@contextmanager
def assumed() -> Iterator[None]:
    """For `with`: a program for GPUs can be traced on a machine that has none, and no cuDNN."""
    installed = of_jax.check_cudnn_version
    if jax.default_backend() != "gpu":
        of_jax.check_cudnn_version = lambda: ASSUMED
    try:
        yield
    finally:
        of_jax.check_cudnn_version = installed
