"""Compiled memory and FLOPs of the captioning loss on a TPU, which this machine need not have, beside the dense form.

Run: python benchmarks/caption_loss.py [--topology v5e:4x4] [--captions 512] [--length 76] [--width 768] [--vocab 256000]

Value and gradient of the mean -log p of the captions' tokens, with respect to states and words. Each device has `captions`
captions; words are replicated; states are bfloat16 and words float32. Temporary memory is the peak without arguments and outputs.
"""

import argparse
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clipjax import aot, config, sharding
from clipjax.losses import token_nll
from clipjax.sharding import BATCH

MIB = 2**20


def dense(states, words, targets):
    logits = jnp.einsum("nd,vd->nv", states, words.astype(states.dtype), preferred_element_type=jnp.float32)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]


def compiled(nll, topology: str, captions: int, length: int, width: int, vocab: int) -> aot.Compiled:
    """The compiled value and gradient, with `captions` on each device. Raises aot.DoesNotFit."""
    mesh = sharding.make_mesh(config.Mesh(), aot.tpu_devices(topology))
    tokens = captions * length * math.prod(mesh.shape.values())

    def loss(states, words, targets):
        rows = jax.shard_map(nll, mesh=mesh, in_specs=(P(BATCH), P(), P(BATCH)), out_specs=P(BATCH))
        return rows(states, words, targets).mean()

    rows, replicated = NamedSharding(mesh, P(BATCH)), NamedSharding(mesh, P())
    args = (
        jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16, sharding=rows),
        jax.ShapeDtypeStruct((vocab, width), jnp.float32, sharding=replicated),
        jax.ShapeDtypeStruct((tokens,), jnp.int32, sharding=rows),
    )
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=(replicated, (rows, replicated)))
    return aot.compile(step.lower(*args))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--topology", default="v5e:4x4")
    for name, default in (("captions", 512), ("length", 76), ("width", 768), ("vocab", 256_000)):
        p.add_argument(f"--{name}", type=int, default=default)
    args = vars(p.parse_args())
    nvd = 2 * args["captions"] * args["length"] * args["vocab"] * args["width"]
    for name, nll in (("streamed", token_nll), ("dense", dense)):
        try:
            result = compiled(nll, **args)
        except aot.DoesNotFit as e:
            print(f"{name}: {e}")
            continue
        stats = result.program.memory_analysis()
        temporary = result.peak_bytes - stats.argument_size_in_bytes - stats.output_size_in_bytes
        flops = result.cost.flops / nvd
        print(f"{name}: {temporary / MIB:,.0f} MiB a chip beside arguments and outputs, {flops:.2f} x 2nvd of products")


if __name__ == "__main__":
    main()
