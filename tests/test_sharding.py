"""The mesh, and how everything is sharded over it."""

import dataclasses
import functools
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from clipjax import aot, config, hlo, placement, sharding
from clipjax.config import ConfigError, ImageTower, Mesh, Model, TextTower
from clipjax.models import clip
from clipjax.plan.program import lower_step, state_of
from clipjax.train.optimizer import make_optimizer
from clipjax.train.state import initial_state
from clipjax.train.step import jit_step, make_train_step
from tests.train import tiny


def abstract(data: int = 1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """Of any size, without devices."""
    return AbstractMesh((1, data, fsdp, tensor), sharding.AXES, axis_types=sharding.AUTO)


def parameters(model: Model) -> dict:
    return jax.eval_shape(lambda: clip.init(model, 0))


def by_path(tree) -> dict:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


SO400M = Model(image=ImageTower.siglip("So400m/14"), text=TextTower.siglip("So400m"), init_bias=-10.0)
B16 = Model(image=ImageTower.clip("B/16"), text=TextTower.clip("B"))


@pytest.mark.parametrize(
    ("cfg", "shape"),
    [
        (Mesh(), (8, 1, 1)),
        (Mesh(data=1, fsdp=-1), (1, 8, 1)),
        (Mesh(data=-1, fsdp=2, tensor=2), (2, 2, 2)),
        (Mesh(data=2, fsdp=4), (2, 4, 1)),
        (Mesh(data=2, fsdp=1, tensor=-1), (2, 1, 4)),
        (Mesh(data=-1, fsdp=8), (1, 8, 1)),
    ],
)
def test_the_mesh_takes_all_devices(cfg, shape):
    mesh = sharding.make_mesh(cfg)
    assert mesh.shape == dict(zip(sharding.AXES, (1, *shape), strict=True))
    assert set(mesh.devices.flat) == set(jax.devices())
    assert sharding.batch_devices(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (Mesh(data=3), "mesh.data = 3, mesh.fsdp = 1, mesh.tensor = 1: must multiply to the number of devices, 8; -1 takes"),
        (Mesh(data=-1, tensor=3), "mesh.data = -1, mesh.fsdp = 1, mesh.tensor = 3: must multiply to the number of devices, 8"),
        (Mesh(data=4, fsdp=4), "mesh.data = 4, mesh.fsdp = 4, mesh.tensor = 1: must multiply"),
        (Mesh(data=2, fsdp=2), "mesh.data = 2, mesh.fsdp = 2, mesh.tensor = 1: must multiply"),
        (Mesh(data=-1, fsdp=16), "mesh.data = -1, mesh.fsdp = 16, mesh.tensor = 1: must multiply"),
    ],
)
def test_a_mesh_that_is_not_of_the_devices_is_refused(cfg, message):
    with pytest.raises(ConfigError, match=message):
        sharding.make_mesh(cfg)


@pytest.mark.parametrize(("size", "near"), [(12, "8 or 16"), (5, "8"), (1023, "1016 or 1024")])
def test_a_batch_that_does_not_divide_is_refused(size, near):
    run = tiny.run(train=config.Train(batch_size=size))
    with pytest.raises(ConfigError, match=f"^train.batch_size = {size}: must be a multiple of the 8 devices .*; try {near}$"):
        sharding.check_batch(run, tiny.mesh_of(2, 4))
    sharding.check_batch(run, tiny.mesh_of(1, 1, 8))  # the tensor axis does not shard it


CASES = {  # width 768, 12 heads, MLP 3072
    "image/blocks/attention/qkv/kernel": ((12, 768, 3, 12, 64), P(None, "fsdp", None, "tensor", None)),
    "image/blocks/attention/qkv/bias": ((12, 3, 12, 64), P(None, None, "tensor", None)),  # a vector of a few KB a layer
    "image/blocks/attention/out/kernel": ((12, 12, 64, 768), P(None, "tensor", None, "fsdp")),
    "text/blocks/mlp/up/kernel": ((12, 768, 3072), P(None, "fsdp", "tensor")),
    "text/blocks/mlp/up/bias": ((12, 3072), P(None, "tensor")),
    "text/blocks/mlp/down/kernel": ((12, 3072, 768), P(None, "tensor", "fsdp")),
    "text/blocks/mlp/down/bias": ((12, 768), P(None, None)),
    "image/blocks/norm1/scale": ((12, 768), P(None, None)),
    "image/map/query/kernel": ((768, 12, 64), P("fsdp", "tensor", None)),
    "image/map/key_value/kernel": ((768, 2, 12, 64), P("fsdp", None, "tensor", None)),
    "image/map/key_value/bias": ((2, 12, 64), P(None, "tensor", None)),
    "image/class_token": ((768,), P(None)),
    "image/wide/out/bias": ((32768,), P("fsdp")),  # 128 KiB
    "text/positions": ((64, 768), P(None, "fsdp")),
    "image/map/out/kernel": ((12, 64, 768), P("tensor", None, "fsdp")),
    "image/map/mlp/up/kernel": ((768, 3072), P("fsdp", "tensor")),
    "image/map/mlp/down/kernel": ((3072, 768), P("tensor", "fsdp")),
    "image/patch/kernel": ((16, 16, 3, 768), P(None, None, None, "fsdp")),
    "text/tokens": ((32000, 768), P("fsdp", None)),
    "log_scale": ((), P()),
}


@pytest.mark.parametrize("prefix", ["", "params/", "opt_state/inner_states/train/inner_state/1/mu/"])
@pytest.mark.parametrize("path", CASES)
def test_how_a_parameter_and_its_moments_are_sharded(path, prefix):
    shape, want = CASES[path]
    assert sharding.spec(prefix + path, shape, abstract(2, 4, 4)) == want


OVER_DATA = {
    "text/blocks/mlp/up/kernel": ((12, 768, 3072), P("data", "fsdp", "tensor")),
    "text/blocks/attention/out/kernel": ((27, 12, 64, 768), P(None, "tensor", "data", "fsdp")),
    "text/blocks/mlp/down/bias": ((12, 768), P(None, None)),  # a small vector
    "text/tokens": ((32000, 768), P("fsdp", "data")),
    "log_scale": ((), P()),
}


@pytest.mark.parametrize("path", OVER_DATA)
def test_what_an_optimizer_over_data_shards(path):
    """In a state; the parameters alone, as the towers get them, are not."""
    shape, want = OVER_DATA[path]
    x, mesh = jax.ShapeDtypeStruct(shape, "float32"), abstract(4, 2, 4)
    state = {"params": {path: x}, "opt_state": {"mu": {path: x}}}
    assert [s.spec for s in jax.tree.leaves(sharding.shardings(state, mesh, {path}))] == [want, want]
    assert "data" not in sharding.shardings({path: x}, mesh)[path].spec
    assert "data" not in sharding.spec(path, shape, abstract(1, 2, 4), over_data=True)


@pytest.mark.parametrize("path", CASES)
def test_axes_of_one_device_are_not_named(path):
    shape, want = CASES[path]
    assert "tensor" not in sharding.spec(path, shape, abstract(4, 4, 1))
    assert "fsdp" not in sharding.spec(path, shape, abstract(4, 1, 4))
    assert sharding.spec(path, shape, abstract(1, 1, 4)) == P(*["tensor" if axis == "tensor" else None for axis in want])


def test_heads_that_do_not_divide_are_replicated():
    assert sharding.spec("image/blocks/attention/qkv/kernel", (12, 768, 3, 12, 64), abstract(1, 1, 8)) == P(*[None] * 5)
    assert sharding.spec("text/blocks/mlp/up/kernel", (12, 768, 3072), abstract(1, 1, 8)) == P(None, None, "tensor")


@pytest.mark.parametrize("model", [tiny.CLIP, tiny.SIGLIP, B16, SO400M], ids=["clip", "siglip", "B/16", "So400m"])
def test_the_axis_of_the_layers_is_never_sharded(model):
    """Also where it is the only one that divides, as by a depth of 27 or 12."""
    for size in (2, 3, 4, 9, 12, 27):
        for mesh in (abstract(1, size), abstract(1, 1, size), abstract(1, size, size)):
            for path, leaf in by_path(parameters(model)).items():
                axes = sharding.spec(path, leaf.shape, mesh)
                assert "/blocks/" not in path or axes[0] is None
                for axis, n in zip(axes, leaf.shape, strict=True):
                    assert axis is None or n % mesh.shape[axis] == 0


@pytest.mark.parametrize("model", [B16, SO400M], ids=["B/16", "So400m"])
@pytest.mark.parametrize("fsdp", [4, 16, 32])
def test_nearly_everything_is_sharded(model, fsdp):
    tree = parameters(model)
    placed = sharding.shardings(tree, abstract(2, fsdp))
    left = sharding.unsharded(tree, placed, "fsdp")
    total = sum(x.size * 4 for x in jax.tree.leaves(tree))
    assert sum(left.values()) < 0.05 * total
    assert {"log_scale"} <= left.keys()
    mine = sum(4 * math.prod(s.shard_shape(x.shape)) for x, s in zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True))
    assert mine == pytest.approx((total - sum(left.values())) / fsdp + sum(left.values()))


@pytest.mark.parametrize(("fsdp", "use"), [(5, "none but 1"), (256, "2, 4, 8, 16, 32, 64, 128")])
def test_a_mesh_that_replicates_too_much_is_refused_by_name(fsdp, use):
    """1152 and 4304 are no multiples of 256: every kernel of the blocks would be on every device."""
    tree = parameters(SO400M)
    with pytest.raises(
        ConfigError, match=rf"^mesh\.fsdp = {fsdp}: only \d+% of the bytes can be sharded so; use {use}\. "
    ) as error:
        sharding.shardings(tree, abstract(1, fsdp))
    assert "Replicated: image/blocks/mlp/" in str(error.value)  # largest first
    assert f"({27 * 1152 * 4304 * 4:,} bytes)" in str(error.value)
    sharding.shardings(tree, abstract(fsdp, 1))  # replicating on purpose is fine


def test_small_vectors_are_no_reason_to_refuse_a_mesh():
    """They are most of a tiny model, and stay on every device on purpose."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32)
    tree = {"kernel": shape((8, 8)), "bias": shape((64,))}
    assert sharding.shardings(tree, abstract(1, 2))["bias"].spec == P(None)
    large = tree | {"bias": shape((2 * sharding.VECTOR + 1,))}
    with pytest.raises(ConfigError, match="Replicated: bias "):
        sharding.shardings(large, abstract(1, 2))


@dataclasses.dataclass(frozen=True)
class Chip:
    """What make_mesh asks of a device that isn't here."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "GPU of a test"
    process_index: int = 0


def test_slices_are_the_outer_part_of_data():
    """Interleaved as jax.devices() may list them; weights stay within a slice, whichever axes shard them."""
    chips = [Chip(i, i % 2) for i in range(16)]
    mesh = sharding.make_mesh(Mesh(data=-1, fsdp=2, tensor=2), chips)
    assert mesh.shape == dict(zip(sharding.AXES, (2, 2, 2, 2), strict=True))
    assert [{chip.slice_index for chip in part.flat} for part in mesh.devices] == [{0}, {1}]
    assert sharding.make_mesh(Mesh(data=1, fsdp=16), chips).shape["slice"] == 1
    with pytest.raises(ConfigError, match=r"^mesh\.data = 1: must be a multiple of the 2 slices, as neither mesh.fsdp nor"):
        sharding.make_mesh(Mesh(data=1, fsdp=16), [dataclasses.replace(chip, platform="tpu") for chip in chips])


def test_rows_become_global_arrays():
    mesh = tiny.mesh_of(2, 2, 2)
    batch = {"image": np.arange(16 * 3, dtype=np.uint8).reshape(16, 3), "text": np.arange(16, dtype=np.int32)}
    placed = sharding.to_global(batch, mesh)
    for name, rows in batch.items():
        assert placed[name].sharding == sharding.over_rows(mesh)
        assert placed[name].dtype == rows.dtype
        np.testing.assert_array_equal(placed[name], rows)
        for shard in placed[name].addressable_shards:  # in order, the same on both devices of `tensor`
            _, data, fsdp, _ = np.argwhere(mesh.devices == shard.device)[0]
            first = 4 * (2 * data + fsdp)
            np.testing.assert_array_equal(shard.data, rows[first : first + 4])


def test_on_shards_sees_its_rows_and_returns_one_value():
    mesh = tiny.mesh_of(2, 4)
    x, y = (np.arange(n, n + 16, dtype=np.float32).reshape(16, 1) for n in (0, 100))

    def fn(x, y, scale):
        assert x.shape == y.shape == (2, 1)
        return scale * jax.lax.psum((x * y).sum(), sharding.BATCH)

    assert float(jax.jit(sharding.on_shards(fn, mesh))(x, y, 2.0)) == 2 * float((x * y).sum())


@pytest.mark.parametrize(
    ("shape", "way"),
    [((8, 1, 1), "data"), ((2, 4, 1), "fsdp"), ((1, 1, 8), "tensor"), ((2, 2, 2), "tensor"), ((1, 1, 1), "data")],
)
def test_the_way_in_which_the_towers_run_follows_from_the_mesh(shape, way):
    mesh = tiny.mesh_of(*shape)
    assert placement.way(mesh) is placement.WAYS[way]
    towers = placement.towers(mesh, "float32")
    assert towers.axes == (sharding.BATCH if way == "data" else ())
    assert towers.placement.devices == (1 if way == "data" else sharding.batch_devices(mesh))
    assert placement.make_placement(mesh, "float32").devices == sharding.batch_devices(mesh)


@pytest.mark.parametrize(
    ("shape", "size"), [((1, 8, 1), (64, 24)), ((2, 4, 1), (10, 6)), ((2, 3, 1), (9, 16)), ((2, 2, 2), (8, 8))]
)
def test_rows_of_a_sharded_table(shape, size):
    """The same rows and the same gradient as of one full table; neither its rows nor its columns need divide by `fsdp`."""
    rng = np.random.default_rng(0)
    table, out = rng.standard_normal(size, np.float32), rng.standard_normal((24, 5, size[1]), np.float32)
    ids = rng.integers(0, size[0], (24, 5), np.int32)
    mesh = tiny.mesh_of(*shape)
    placed = jax.device_put(table, jax.NamedSharding(mesh, sharding.spec("text/tokens", size, mesh)))

    @jax.jit
    def rows(table, ids):
        found, pull = jax.vjp(lambda t: placement.look_up_on(mesh)(t, ids), table)
        return found, pull(out)[0]

    found, gradient = rows(placed, jax.device_put(ids, sharding.over_rows(mesh)))
    np.testing.assert_array_equal(found, table[ids])
    want = np.zeros(size)
    np.add.at(want, ids, out)
    np.testing.assert_allclose(gradient, want, atol=1e-5 * np.abs(want).max())


def test_the_tables_of_the_ways_agree():
    """The data, the docstring above it and the page."""
    page = Path(__file__).parents[1] / "docs" / "towers.md"
    for text, form in ((placement.__doc__, r"^\| (\w+) +\|"), (page.read_text(), r"^\| `(\w+)` \|")):
        assert [name for name in re.findall(form, text, re.MULTILINE) if name != "axis"] == list(placement.WAYS)


def full_arrays(text: str, shape: tuple[int, ...]) -> list[str]:
    """The instructions of a program that make a float32 array of this size, however it is turned."""
    found = [i for computation in hlo.parse(text)[0].values() for i in computation.body.values()]
    sizes = sorted(n for n in shape if n > 1)
    return [i.name for i in found if ("f32", sizes) in [(kind, sorted(n for n in d if n > 1)) for kind, d in hlo.arrays(i.shape)]]


@pytest.mark.slow
def test_a_tpu_step_never_has_the_full_table():
    """Nor its gradient, nor float32 kernels of patches and pooling; vectors are not gathered."""
    width, words = 136, 5000
    sizes = dict(width=width, heads=2, mlp_dim=264, depth=2)
    image = dataclasses.replace(tiny.SIGLIP.image, **sizes)
    text = dataclasses.replace(tiny.SIGLIP.text, vocab_size=words, embed_dim=width, **sizes)
    model = dataclasses.replace(tiny.SIGLIP, image=image, text=text, dtype="bfloat16", remat="full")
    run = tiny.run(model, mesh=config.Mesh(data=1, fsdp=8))
    mesh = sharding.make_mesh(run.mesh, aot.tpu_devices("v5e:2x4"))
    program = aot.compile(lower_step(run, mesh, state_of(run, mesh))).program.as_text()
    assert full_arrays(program, (words, width // 8))
    for shape in ((words, width), (8, 8, 3, width), (192, width), (width, 2, 2, 68), (width, 2 * width)):
        assert not full_arrays(program, shape)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "share"), [((2, 4, 1), 0.28), ((2, 2, 2), 0.36)])
def test_no_device_holds_a_full_copy_of_what_is_sharded(shape, share):
    """The state is initialised sharded. The compiled step takes and gives it so, and needs no more memory than the shards."""
    run = tiny.run(optim=dataclasses.replace(tiny.OPTIM, ema=0.9))
    mesh = tiny.mesh_of(*shape)
    tx = make_optimizer(run.optim, run.train.steps, parameters(run.model))
    state = initial_state(run, tx, mesh)
    step = jit_step(make_train_step(run, tx, mesh), state, mesh)
    batch = sharding.to_global(tiny.batches(run, 1)[0], mesh)
    compiled = step.lower(state, batch).compile()
    made, metrics = compiled.output_shardings
    for (path, leaf), out in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(made), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        want = sharding.spec(name, leaf.shape, mesh)
        assert leaf.sharding.spec == want, name
        assert out.is_equivalent_to(leaf.sharding, leaf.ndim), name
        assert leaf.addressable_shards[0].data.size == leaf.size / math.prod(mesh.shape[a] for a in want if a)
    assert all(s.is_fully_replicated for s in jax.tree.leaves(metrics))
    mine = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((state, batch)))
    assert mine < share * sum(leaf.nbytes for leaf in jax.tree.leaves((state, batch)))
    assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(mine, rel=0.05)
