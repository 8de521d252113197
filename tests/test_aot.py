"""Compiling for TPUs that this machine does not have, and the messages where that fails."""

import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from clipjax import aot, config, sharding
from clipjax.config import ConfigError


class Failing:
    """A lowered program for which the compiler fails with this message."""

    def __init__(self, message):
        self.message = message

    def compile(self, options):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (16.50G) exceeds available HBM (15.75G). HLO module: jit_f.\nSee https://openxla.org/xla/errors",
            (16.5 * 2**30, 15.75 * 2**30),
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 1.00T of 15.75G hbm.", (2**40, 15.75 * 2**30)),
        ("RESOURCE_EXHAUSTED: no more", (None, None)),
    ],
)
def test_what_does_not_fit(message, sizes):
    with pytest.raises(aot.DoesNotFit) as e:
        aot.compile(Failing(message))
    assert (e.value.needed, e.value.capacity) == sizes


def test_a_failing_compiler_is_no_lack_of_memory():
    with pytest.raises(aot.CompilerError, match=r"^INTERNAL: RET_CHECK failure: Async done requires$"):
        aot.compile(Failing("INTERNAL: RET_CHECK failure: Async done requires\n*** Begin stack trace"))


def test_a_compiler_that_writes_no_text_is_an_error():
    class Silent:
        def compile(self, options):
            assert options.keys() == {"xla_dump_to"}

    with pytest.raises(aot.CompilerError, match="it wrote 0 texts of the program"):
        aot.compile(Silent(), dump=True)


def test_the_setting_of_the_compile_cache_is_restored():
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    aot.compile(jax.jit(lambda x: x + 1).lower(1.0))
    with pytest.raises(aot.CompilerError):
        aot.compile(Failing("INTERNAL"))
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before


def test_a_program_for_this_machine():
    x = jax.ShapeDtypeStruct((256, 64), jnp.float32)
    found = aot.compile(jax.jit(lambda x: jnp.sort(x @ x.T, 0).sum()).lower(x))
    assert found.cost.flops == 2 * 256**2 * 64
    assert found.argument_bytes == 256 * 64 * 4
    assert found.peak_bytes >= 256 * 64 * 4 + 256 * 256 * 4  # XLA's own peak for a CPU does not count temporaries
    assert found.program(jnp.zeros((256, 64))) == 0
    assert found.seconds > 0


@pytest.mark.parametrize(
    ("topology", "remedy"),
    [
        ("v5e:3x3", "the nearest is v5e:4x4; v5e comes as 1x1, 2x2, 2x4"),
        ("v9:2x2", "the kinds are v2, v3"),
        ("v5e-256", "v5e:16x16"),
        ("v5litepod-16", "v5e:4x4"),
        ("v5litepod:4x8", "v5e:4x8"),
        ("v5e:16X16", "v5e:16x16"),
        ("v5e:15x16", "v5e:16x16"),
        ("v5e:16x32", "v5e:16x16"),  # libtpu compiles for it, but it can't be rented
        ("v6e-8", "v6e:2x4"),
        ("v5p-128", "v5p:4x4x4"),  # so many cores, two a chip
        ("v5:4x4x4", "v5p:4x4x4"),
        ("v4:4x4", "v4:2x4x4"),
        ("v7x:4x4x4", "tpu7x:4x4x4"),
        ("trillium", "v6e:2x2"),
        ("", "2x2"),
        ("\n:0x", "2x2"),
    ],
)
def test_unknown_topologies_are_refused_with_the_nearest(topology, remedy):
    with pytest.raises(ConfigError, match="there is no such topology; the nearest is") as e:
        aot.tpu_devices(topology)
    assert str(e.value).startswith(f"--topology = {topology!r}: ")
    assert remedy in str(e.value)
    near = str(e.value).split("the nearest is ")[1].split(";")[0]
    kind, shape = near.split(":")
    assert shape in aot.TOPOLOGIES[kind].split()


def test_slices_are_joined():
    pytest.importorskip("libtpu", reason="the TPU compiler: pip install libtpu")
    devices = aot.tpu_devices("v5e:2x4", slices=3)
    assert [d.slice_index for d in devices] == [0] * 8 + [1] * 8 + [2] * 8


def test_without_the_compiler_the_message_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(ConfigError, match=r"v5e:4x4.*pip install libtpu"):
        aot.tpu_devices("v5e:4x4")


@pytest.mark.parametrize("topology", [f"{kind}:{shapes.split()[0]}" for kind, shapes in aot.TOPOLOGIES.items()])
def test_every_kind_is_known_to_libtpu(topology):
    pytest.importorskip("libtpu", reason="the TPU compiler: pip install libtpu")
    devices = aot.tpu_devices(topology)
    shape = [int(n) for n in topology.split(":")[1].split("x")]
    chips = {tuple(d.coords) for d in devices}
    assert len(chips) == jnp.prod(jnp.array(shape))
    assert len(devices) == len(chips) * (2 if topology.startswith(("v2", "v3", "tpu7x")) else 1)


def test_a_program_for_a_tpu():
    pytest.importorskip("libtpu", reason="the TPU compiler: pip install libtpu")
    mesh = sharding.make_mesh(config.Mesh(), aot.tpu_devices("v5e:2x4"))

    def fn(x):  # [256, 256] a chip
        def outer(c, _):
            def inner(c, _):
                return jnp.tanh(c @ c.T) @ c, None

            c = jax.lax.scan(inner, c, length=5)[0]
            return jax.lax.ppermute(c, "data", [(i, (i + 1) % 8) for i in range(8)]), None

        c = jax.lax.scan(outer, x, length=3)[0]
        heads = c.reshape(4, 64, 4, 64)
        met = jnp.einsum("bqhd,bkhd->bhqk", heads, heads)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(met), heads).reshape(256, 256)

    x = jax.ShapeDtypeStruct((8 * 256, 256), jnp.float32, sharding=sharding.over_rows(mesh))
    found = aot.compile(jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=P("data"), out_specs=P("data"))).lower(x))
    assert found.cost.flops == 3 * 5 * 2 * (2 * 256**3) + 2 * 2 * 16 * 64**3
    assert found.cost.uncounted == ()
    assert found.cost.collectives["collective-permute"].count == 3
    assert found.cost.collectives["collective-permute"].bytes == 3 * 256**2 * 4
    assert found.argument_bytes == 256**2 * 4
    assert found.peak_bytes >= 2 * 256**2 * 4


def test_too_much_for_a_tpu():
    pytest.importorskip("libtpu", reason="the TPU compiler: pip install libtpu")
    mesh = sharding.make_mesh(config.Mesh(), aot.tpu_devices("v5e:2x2"))
    x = jax.ShapeDtypeStruct((2**18, 128), jnp.float32, sharding=sharding.over_rows(mesh))
    with pytest.raises(aot.DoesNotFit) as e:
        aot.compile(jax.jit(lambda x: jnp.sort(x @ x.T, 0)).lower(x))
    assert e.value.needed > e.value.capacity > 15 * 2**30
