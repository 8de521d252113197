"""What a device holds and computes for a loss, by compilers: memory linear in its share of the batch, and few products."""

import jax
import pytest

from clipjax import aot, config, sharding
from clipjax.bench.loss_forms import columns_travel, lower, streamed
from clipjax.config import Classify
from clipjax.losses import Rows, Shared
from clipjax.losses.classify import classify

MIB = 2**20


def compiled(name, batch, width, *, topology=None, travel="auto"):
    devices = jax.devices()
    if topology:
        pytest.importorskip("libtpu", reason="the TPU compiler: pip install libtpu")
        devices = aot.tpu_devices(topology)
    mesh = sharding.make_mesh(config.Mesh(), devices)
    with columns_travel(travel):
        found = aot.compile(lower(streamed(name, mesh), name, batch, width, mesh))
    assert found.cost.uncounted == ()
    return found, found.cost.flops * len(devices) / (batch**2 * width)


@pytest.mark.parametrize("travel", ["ring", "gather"])
@pytest.mark.parametrize(("name", "most"), [("softmax", 9), ("sigmoid", 7), ("cuaxu", 28)])
def test_products(name, most, travel):
    assert compiled(name, 8192, 64, travel=travel)[1] <= most


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "cuaxu"])
def test_memory_is_linear_in_the_batch(name):
    """With the ring. What grows is a device's own rows, their gradients and a few copies of both."""
    sizes = [compiled(name, batch, 64, travel="ring")[0] for batch in (8192, 16384, 32768)]
    first, second, third = (x.peak_bytes for x in sizes)
    assert third - second <= 2.05 * (second - first)
    assert third - second <= 6 * (sizes[2].argument_bytes - sizes[1].argument_bytes)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most", "products"), [("softmax", 25, 9), ("sigmoid", 25, 7), ("cuaxu", 40, 28)])
def test_a_pod(name, most, products):
    full, flops = compiled(name, 131_072, 1152, topology="v5e:16x16")
    half, _ = compiled(name, 65_536, 1152, topology="v5e:16x16")
    assert full.peak_bytes <= most * MIB
    assert full.peak_bytes <= 2.1 * half.peak_bytes
    assert flops <= products


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_a_million_pairs_on_eight_chips(name):
    found, flops = compiled(name, 2**20, 512, topology="v5e:2x4")
    assert found.peak_bytes <= 2048 * MIB
    assert found.cost.overlapped > 0  # a permute is under way while a product runs
    assert flops <= {"softmax": 9, "sigmoid": 7}[name]


@pytest.mark.slow
def test_a_million_classes_on_a_pod():
    """MLCD of 32,768 images with 8 labels each, and a tenth of the classes: beside these, their weights and the gradients."""
    pytest.importorskip("libtpu", reason="the TPU compiler: pip install libtpu")
    mesh = sharding.make_mesh(config.Mesh(), aot.tpu_devices("v5e:16x16"))
    term = Classify(loss="mlcd", sampled=0.1)

    def loss(z, w, labels, key):
        rows = Rows(z, z, labels=labels, classes=w, shared=Shared(key=key))
        return classify(term, rows, None, None, sharding.BATCH).value

    of_rows = sharding.on_shards(loss, mesh, rows=3)

    def gradient(z, w, labels, seed):
        return jax.grad(lambda z, w: of_rows(z, w, labels, jax.random.key(seed)), (0, 1))(z, w)

    rows, count = sharding.over_rows(mesh), config.Model(classes=config.Classes(count=1_000_000)).class_shape[0]
    given = ((32_768, 768), "float32"), ((count, 768), "float32"), ((32_768, 8), "int32")
    shapes = [jax.ShapeDtypeStruct(*x, sharding=rows) for x in given]
    lowered = jax.jit(gradient, out_shardings=(rows, rows)).lower(*shapes, jax.ShapeDtypeStruct((), "uint32"))
    assert aot.compile(lowered).peak_bytes - 2 * count // 256 * 768 * 4 <= 50 * MIB
