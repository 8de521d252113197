"""A program that the tests read as the GPU compiler wrote it: tests/gpu_program.txt.

Where that compiler is installed (pip install 'clipjax[gpu-plan]'), this writes it anew: python -m tests.gpu_program
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from clipjax import aot, config, gpus, sharding

TEXT = Path(__file__).with_suffix(".txt")
GPUS, ROWS, TOKENS, WIDTH, DEPTH, WORDS = 4, 16, 64, 128, 3, 512  # rows of a GPU
PRODUCTS = 3 * DEPTH * (2 * ROWS * TOKENS * TOKENS * WIDTH * 2 + 2 * ROWS * TOKENS * WIDTH * WIDTH)  # forward, and two backward
SUMMED = 2 * (DEPTH * WIDTH * WIDTH + WORDS * WIDTH) + 4  # bytes: gradients in bfloat16, and the loss


def loss(weights, table, tokens):
    """Something like a text tower: layers of attention and a product, pooled at the largest token."""
    x = table[tokens]

    def layer(x, w):
        scores = jnp.einsum("btd,bsd->bts", x, x)
        return jnp.tanh(jnp.einsum("bts,bsd->btd", scores, x) @ w), None

    x = jax.lax.scan(layer, x, weights)[0]
    pooled = x[jnp.arange(len(x)), tokens.argmax(-1)].astype(jnp.float32)
    return (pooled**2).mean()


def compiled(kind: str = "h100") -> aot.Compiled:
    """The step's program for one host of these GPUs, with products of cuBLAS."""
    mesh = sharding.make_mesh(config.Mesh(), gpus.gpu_devices(f"{kind}:{GPUS}"))
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
        for shape, dtype, axes in [
            ((DEPTH, WIDTH, WIDTH), jnp.bfloat16, ()),
            ((WORDS, WIDTH), jnp.bfloat16, ()),
            ((GPUS * ROWS, TOKENS), jnp.int32, (sharding.BATCH,)),
        ]
    ]
    return aot.compile(jax.jit(jax.value_and_grad(loss, (0, 1)), compiler_options=aot.LIBRARY_PRODUCTS).lower(*shapes))


def main() -> None:
    text = compiled().program.as_text()
    text = re.sub(r", metadata=\{[^}]*\}", "", text[text.index("\n%") :])
    text = re.sub(r'"(reification_cost|device_type|force_earliest_schedule|native_emitter_backend_config)":[^,}]*[,}]', "", text)
    TEXT.write_text("HloModule small_step, is_scheduled=true\n" + text)


if __name__ == "__main__":
    main()
