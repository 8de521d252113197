"""`clipjax plan`: the figures of small runs, on simulated devices and for TPUs, and the messages where it fails."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from clipjax import aot, cli, config, losses, plan, sharding
from clipjax.hlo import Collective, Cost
from clipjax.plan import report
from clipjax.plan.estimate import Estimate, estimate
from clipjax.plan.figures import _argument_bytes
from clipjax.plan.flops import step_flops
from clipjax.plan.program import label_count, state_of
from clipjax.plan.search import Try, largest, search, sizes
from tests.train import tiny, tiny_emoji

CONFIG = str(Path(tiny_emoji.__file__))
KEYS = {
    *("topology", "chips", "batch_size", "fits", "peak_bytes_per_chip", "argument_bytes", "temp_bytes", "capacity_bytes"),
    *("sharded_fraction", "unsharded", "collectives", "flops_per_step", "estimate", "largest_batch"),
}


def command(*args) -> int:
    """The exit status, however it comes."""
    try:
        return cli.main(["plan", *map(str, args)])
    except SystemExit as e:
        return e.code or 0


def planned(cfg, topology="cpu:8"):
    return plan.make_plan(cfg, plan.make_target(cfg, topology))


@pytest.fixture(scope="module")
def sharded():
    """The plan of a run with example memory and averaged weights, on 2 x 2 x 2 devices."""
    optim = dataclasses.replace(tiny.OPTIM, ema=0.9)
    cfg = tiny.run(objective=(config.Sogclr(examples=100),), optim=optim, mesh=config.Mesh(data=2, fsdp=2, tensor=2))
    return cfg, *planned(cfg)


def test_memory_by_kind_adds_up(sharded):
    cfg, found, fixed = sharded
    memory = dict(found.memory)
    assert list(memory) == [
        *("parameters", "optimizer state", "moving average", "example memory", "batch", "padding", "temporaries"),
    ]
    assert sum(memory.values()) == found.peak_bytes_per_chip
    assert found.argument_bytes == found.peak_bytes_per_chip - memory["temporaries"]
    assert abs(memory["padding"]) < 0.01 * found.argument_bytes
    assert memory["moving average"] == memory["parameters"]
    assert 2 * memory["parameters"] <= memory["optimizer state"] < 2.01 * memory["parameters"]  # two moments and a count
    assert memory["example memory"] == 2 * 1024 * 4 / 4  # two float32 of 1,024 rows, over data x fsdp
    pair = 3 * cfg.model.image.image_size**2 + 4 * cfg.model.text.length + 4
    assert memory["batch"] == cfg.train.batch_size // 4 * pair
    assert fixed == sum(memory.values()) - memory["batch"] - memory["padding"] - memory["temporaries"]
    assert found.fits
    assert found.capacity_bytes > found.peak_bytes_per_chip


def test_what_is_sharded_and_what_is_not(sharded):
    _, found, _ = sharded
    assert found.mesh["fsdp"] == found.mesh["tensor"] == 2
    assert 0.9 < found.sharded_fraction < 1  # the kernel of patches is gathered; vectors are not sharded
    assert found.unsharded == []  # all tensors are small
    replicated, _ = planned(tiny.run())
    assert replicated.sharded_fraction == 0
    assert replicated.state_bytes < found.state_bytes  # which has averaged weights and example memory


@pytest.mark.slow
def test_large_replicated_tensors_are_listed():
    model = dataclasses.replace(tiny.CLIP, text=dataclasses.replace(tiny.CLIP.text, vocab_size=20000))
    found, _ = planned(tiny.run(model))
    assert [x["name"].endswith("text/tokens") for x in found.unsharded] == [True] * 3  # with its moments
    assert {x["bytes"] for x in found.unsharded} == {20000 * 32 * 4}
    assert {x["when"] for x in found.unsharded} == {"always"}
    sharded, _ = planned(tiny.run(model, mesh=config.Mesh(fsdp=2)))
    assert sharded.unsharded == []
    assert sharded.memory["parameters"] < 0.6 * found.memory["parameters"]


@pytest.mark.slow
def test_what_a_step_gathers_in_full_is_listed_too():
    """The kernels of pooling; not the table of tokens, nor the layers, of which one is gathered at a time."""
    sizes = dict(mlp_dim=10_000), dict(vocab_size=20_000)
    image, text = (
        dataclasses.replace(tower, **new) for tower, new in zip((tiny.SIGLIP.image, tiny.SIGLIP.text), sizes, strict=True)
    )
    model = dataclasses.replace(tiny.SIGLIP, image=image, text=text)
    found, _ = planned(tiny.run(model, mesh=config.Mesh(data=1, fsdp=8)))
    kernel = 32 * 10_000 * 4
    names = [f"params/image/map/mlp/{name}/kernel" for name in ("down", "up")]
    assert sorted(found.unsharded, key=lambda x: x["name"]) == [
        {"name": n, "bytes": kernel, "when": "in the step"} for n in names
    ]
    assert found.sharded_fraction == pytest.approx(1 - 2 * kernel / found.state_bytes, abs=0.02)
    assert any("params/image/map/mlp/up/kernel" in line and "in the step" in line for line in report.lines(found))


def test_the_program_is_the_one_that_trains(sharded):
    cfg, found, _ = sharded
    compiled = plan.compile_run(cfg, jax.devices())
    assert found.program_flops == compiled.cost.flops * 8
    assert found.peak_bytes_per_chip == compiled.peak_bytes
    assert found.collectives == {k: dataclasses.asdict(c) for k, c in compiled.cost.collectives.items()}
    assert set(found.collectives) >= {"all-gather", "all-reduce"}


def test_a_batch_has_what_the_data_adds(tmp_path):
    data = config.Data(
        spec="emoji",
        views=(config.View(), config.View(crop=0.5)),
        captions_per_image=2,
        text_augment=config.TextAugment(count=1),
        ids="caption",
        teacher=str(tmp_path / "elsewhere.npz"),
    )
    cfg = tiny.run(objective=(config.MultiPositive(), config.Distillation()), data=data)
    mesh = sharding.make_mesh(cfg.mesh)
    batch = plan.abstract_batch(cfg, mesh)
    shapes = {name: (x.shape, str(x.dtype)) for name, x in batch.items()}
    assert shapes == {
        "image": ((16, 2, 16, 16, 3), "uint8"),
        "text": ((16, 3, 8), "int32"),
        "index": ((16,), "int32"),
        "id": ((16,), "int32"),
        "teacher_image": ((16, 16), "float32"),
        "teacher_text": ((16, 16), "float32"),
    }
    compiled = plan.compile_run(cfg, jax.devices())
    assert compiled.cost.flops > 0


@pytest.mark.parametrize(("name", "count"), [("own", 1), ("elsewhere.npz", 1), ("labels.npz", 3)])
def test_a_batch_has_the_labels_of_the_file(tmp_path, name, count):
    np.savez(tmp_path / "labels.npz", label=np.zeros((5, 3), np.int32), key=[*"abcde"])
    labels = name if name == "own" else str(tmp_path / name)
    cfg = tiny.run(data=config.Data(spec="emoji", labels=labels))
    label = plan.abstract_batch(cfg, sharding.make_mesh(cfg.mesh))["label"]
    assert (label.shape, str(label.dtype)) == ((16, count), "int32")


def test_a_file_of_something_else_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", key=[*"abcde"])
    cfg = tiny.run(data=config.Data(spec="emoji", labels=str(tmp_path / "x.npz")))
    with pytest.raises(config.ConfigError, match=r"^data\.labels = '.*x\.npz': must hold arrays label and key"):
        label_count(cfg)


# By hand and in the program


@pytest.mark.parametrize(
    ("term", "recomputed"),
    [
        (config.Softmax(), 2),
        (config.Softmax(prefixes=(16, 64)), 2.5),
        (config.Sigmoid(), 0),
        (config.Sigmoid(prefixes=(16, 64)), 0),
        (config.HardNegative(), 6),  # two passes over the same cosines
        (config.MultiPositive(), 2),
        (config.Cwcl(), 2),
        (config.Distillation(), 3),
        (config.Uniformity(), 4),
        (config.CrossUniformity(), 2),
        (config.Alignment(), 0),
        (config.Repulsion(), 2),
        (config.MannWhitney(), 0),
        (config.MultiSimilarity(), 2),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_terms_by_hand_are_what_is_computed(term, recomputed):
    """`recomputed`, in B^2 d: what the backward pass recomputes; XLA removes it here, where all pairs are one tile."""
    size, width, teacher = 512, 64, 32
    z = [jax.ShapeDtypeStruct((size, width), "float32")] * 2
    teachers = [jax.ShapeDtypeStruct((size, teacher), "float32")] * 2

    def loss(x, y, u, v):
        return losses.objective((term,), losses.Rows(x, y, None, (u, v)), 10.0, -10.0)[0]

    compiled = aot.compile(jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*z, *teachers))
    by_hand = losses.term_flops(term, losses.Sizes(size, 1, width, teacher)) - recomputed * size**2 * width
    assert compiled.cost.flops == pytest.approx(by_hand, rel=0.05)


def test_flops_by_part():
    data = config.Data(spec="emoji", captions_per_image=3, ids="caption")
    terms = (config.MultiPositive(), config.Softmax(), config.Softmax(weight=0.0), config.Softmax(weight=2.0))
    one = step_flops(tiny.run(objective=(config.Softmax(),)), {"image/blocks/x", "text/blocks/x"})
    assert list(one) == ["image tower", "text tower", "softmax loss"]
    assert one["softmax loss"] == 8 * 16**2 * 16
    many = step_flops(tiny.run(objective=terms, data=data), {"image/blocks/x", "text/blocks/x"})
    assert list(many) == ["image tower", "text tower", "multi_positive loss", "softmax loss 1", "softmax loss 3"]
    assert many["text tower"] == 3 * one["text tower"]
    assert many["image tower"] == one["image tower"]
    data = config.Data(spec="emoji", views=(config.View(),) * 3, captions=(1, 0), text_augment=config.TextAugment(count=2))
    viewed = step_flops(tiny.run(data=data), {"image/blocks/x", "text/blocks/x"})
    assert [viewed[name] / one[name] for name in one] == [3, 4, 12]
    assert many["softmax loss 1"] == 3 * one["softmax loss"]


def test_bytes_of_heads_classes_views_and_labels():
    """Classes are divided over the devices of the batch, with their moments; a head is on each. Nothing is compiled."""
    head = config.Head(name="a", side="image", hidden=64, width=8)
    model = dataclasses.replace(tiny.CLIP, heads=(head,), classes=config.Classes(count=40))
    more = dict(views=(config.View(name="a"), config.View(name="b")), labels="own")

    def bytes_of(cfg):
        mesh = sharding.make_mesh(cfg.mesh)
        return _argument_bytes(state_of(cfg, mesh), plan.abstract_batch(cfg, mesh))

    before, after = bytes_of(tiny.run()), bytes_of(tiny.run(model, data=config.Data(spec="emoji", **more)))
    of_head = 32 * 64 + 2 * 64 + 64 * 8 + 8  # a product, LayerNorm, a product with a bias
    of_classes = 1024 * 16 // 8  # rows that every mesh divides
    assert after["parameters"] - before["parameters"] == 4 * (of_head + of_classes)
    assert after["optimizer state"] - before["optimizer state"] == 8 * (of_head + of_classes)
    assert after["batch"] - before["batch"] == 2 * (16 * 16 * 3 + 4)  # two examples a device: a view more, and a label


# The estimate


class Device:
    platform = "tpu"

    def __init__(self, kind="TPU v5 lite", process_index=0):
        self.device_kind, self.process_index = kind, process_index
        self.platform = "tpu" if kind.startswith("TPU") else "gpu"


def cost(**changes):
    made = dict(flops=10**12, collectives={"all-reduce": Collective(1, 10**6)}, started=0, overlapped=0, uncounted=())
    made |= dict(tpu_flops=10**12, memory_bytes=10**6, sent_bytes=10**6, sent_between_slices=0)
    return Cost(**(made | changes))


@pytest.mark.parametrize(
    ("changes", "bound", "seconds"),
    [
        ({}, "compute", 1e12 / 197e12),
        (dict(tpu_flops=6 * 10**12), "compute", 6e12 / 197e12),
        (dict(memory_bytes=10**11), "memory", 1e11 / 819e9),
        (dict(sent_bytes=10**11), "links", 1e11 / 200e9),
        (dict(sent_between_slices=10**9), "network", 1e9 / (25e9 / 8)),
    ],
)
def test_the_slowest_part_bounds_the_step(changes, bound, seconds):
    found = estimate(cost(**changes), [Device()] * 16, batch=1000, model_flops=1e12)
    assert (found.bound, found.lacks) == (bound, ())
    assert found.step_seconds == pytest.approx(seconds) == max(found.seconds.values())
    assert found.images_per_second == pytest.approx(1000 / seconds)
    assert found.mfu == pytest.approx(1e12 / (seconds * 16 * 197e12))


def test_a_device_that_is_half_a_chip_has_half_of_everything():
    chip = estimate(cost(), [Device("TPU v4")] * 2, 10, 1e12)
    half = estimate(cost(), [Device("TPU7x")] * 2, 10, 1e12)
    assert half.step_seconds == pytest.approx(chip.step_seconds * 275 / (2307 / 2))
    assert half.mfu == pytest.approx(chip.mfu * 1)


def test_what_is_not_known_is_listed():
    assert estimate(cost(), jax.devices(), 10, 1e12) == Estimate(lacks=("the peaks of cpu",))
    gpus = [Device("NVIDIA H100 80GB HBM3", process) for process in (0, 0, 1, 1)]
    gpu = estimate(cost(sent_between_slices=5, uncounted=("loop",)), gpus, 10, 1e12)
    assert "hosts" not in " ".join(estimate(cost(), gpus[:2], 10, 1e12).lacks)
    assert gpu.bound == "compute"
    assert [word for lack in gpu.lacks for word in ("network", "float32", "hosts", "1 loops") if word in lack] == [
        *("network", "float32", "hosts", "1 loops")
    ]


# The largest batch


def tries(first, limit, unit=8, a_pair=7.0, fixed=100):
    """A search on a device of 1,000 bytes, which holds `limit` pairs at most: the sizes that it asks for, and its answer."""
    asked = []

    def attempt(size):
        asked.append(size)
        return Try(size, size <= limit, int(fixed + a_pair * size), 1.0)

    known = [attempt(first)]
    asked.clear()
    known += search(known[0], attempt, unit, 1000, fixed)
    return asked, largest(known, unit)


@pytest.mark.parametrize(
    ("first", "a_pair", "asked", "found"),
    [
        (8, 7.0, [256, 128], 128),  # the one above asked first, where "no" is cheap
        (128, 7.0, [256], 128),
        (256, 7.0, [128], 128),
        (4096, 7.0, [256, 128], 128),
        (100, 7.0, [256, 128], 128),  # no power of two itself
        (8, 1000.0, [], None),
    ],
)
def test_the_search_compiles_few_sizes(first, a_pair, asked, found):
    limit = 900 / a_pair
    assert tries(first, limit, a_pair=a_pair) == (asked, found)


@pytest.mark.parametrize("limit", [8, 9, 100, 1000, 10**6])
@pytest.mark.parametrize("first", [8, 64, 4096])
def test_the_search_finds_it_even_if_the_prediction_is_wrong(limit, first):
    asked, found = tries(first, limit)
    assert found == 2 ** (limit.bit_length() - 1)
    assert len(asked) == len(set(asked)) < 20


def test_a_compiler_that_fails_is_not_out_of_memory():
    known = [Try(8, True, 200, 1.0)]
    known += search(known[0], lambda size: Try(size, None, None, 1.0, "INTERNAL"), 8, 1000, 100)
    assert [t.fits for t in known] == [True, None]
    assert largest(known, 8) == 8
    assert "the compiler failed: INTERNAL" in report.outcome(known[-1])


def test_sizes_divide_over_the_mesh():
    assert sizes(8)[:3] == [8, 16, 32]
    assert sizes(768)[:2] == [768, 1536]  # three slices of 256
    assert all(size % 24 == 0 for size in sizes(24))


@pytest.mark.slow
def test_the_largest_batch_of_this_machine(monkeypatch, capsys, tmp_path):
    """CPUs don't refuse a program: what it needs is compared with what there is."""
    monkeypatch.setattr(aot, "capacity", lambda devices: 3 * 2**20)
    out = tmp_path / "plan.json"
    assert command(CONFIG, "--topology", "cpu:2", "--find-batch", "--train.micro_batches", "2", "--json", out) == 0
    said = capsys.readouterr()
    result = json.loads(out.read_text())
    found = result["largest_batch"]
    needed = {t["batch_size"]: t["needed"] for t in result["tries"]}
    assert needed[found] <= 3 * 2**20 < needed[2 * found]
    assert f"Largest batch with train.micro_batches = 2: {found:,} pairs" in said.out
    assert said.err.count("out of memory") + said.err.count("fits") == len(result["tries"]) - 1


# The command


def test_a_plan_as_text_and_as_json(tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert command(CONFIG, "--topology", "cpu:4", "--json", out, "--train.batch_size", "32", "--mesh.fsdp", "2") == 0
    said = capsys.readouterr()
    result = json.loads(out.read_text())
    assert result.keys() >= KEYS
    assert result["estimate"].keys() >= {"step_seconds", "images_per_second", "mfu"}
    assert all(figures.keys() == {"count", "bytes"} for figures in result["collectives"].values())
    assert (result["topology"], result["chips"], result["batch_size"], result["fits"]) == ("cpu:4", 4, 32, True)
    assert (result["largest_batch"], result["remat"], result["part"]) == (None, "none", None)
    assert result["remat_reason"] == "as on every CPU"
    assert result["flops_per_step"] == sum(result["flops"].values())
    for part in (
        "4 chips",
        "data 2, fsdp 2",
        "model.remat: none, as on every CPU",
        "parameters",
        "temporaries",
        "fits",
        "all-reduce",
        "softmax loss",
        "not a measurement",
    ):
        assert part in said.out
    assert "compiling the step of batch 32 for 4 x cpu" in said.err


def test_what_does_not_fit_is_an_answer(tmp_path, capsys, monkeypatch):
    def refuse(lowered, **_):
        raise aot.DoesNotFit(17 * 2**30, 15 * 2**30)

    monkeypatch.setattr(aot, "compile", refuse)
    out = tmp_path / "plan.json"
    assert command(CONFIG, "--topology", "cpu:4", "--json", out) == 0
    result = json.loads(out.read_text())
    assert (result["fits"], result["peak_bytes_per_chip"], result["temp_bytes"]) == (False, 17 * 2**30, None)
    assert result["collectives"] == {}
    assert result["estimate"]["step_seconds"] is None
    assert result["argument_bytes"] > 0
    assert "out of memory: needs 17.00 GiB" in capsys.readouterr().out


def test_a_failing_compiler_is_reported(tmp_path, capsys, monkeypatch):
    def crash(lowered, **_):
        raise aot.CompilerError("INTERNAL: RET_CHECK failure: Async done requires")

    monkeypatch.setattr(aot, "compile", crash)
    assert command(CONFIG, "--topology", "cpu:4", "--json", tmp_path / "plan.json") == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == (
        "clipjax: the compiler failed, which says nothing about memory: INTERNAL: RET_CHECK failure: Async done requires"
    )
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "CONFIG.py is needed"),
        ([CONFIG, "--topology", "v5e-256"], "--topology = 'v5e-256': there is no such topology; the nearest is v5e:16x16"),
        ([CONFIG, "--topology", "cpu:0"], "name their number, as cpu:8"),
        ([CONFIG, "--topology", "cpu:many"], "name their number, as cpu:8"),
        ([CONFIG, "--topology", "cpu:9"], "JAX has started with 8 devices"),
        ([CONFIG, "--slices", "2"], "--slices = 2: only TPUs have several slices"),
        ([CONFIG, "--topology", "cpu:3"], "train.batch_size = 16: must be a multiple of the 3 devices"),
        ([CONFIG, "--topology", "cpu:8", "--mesh.fsdp", "3"], "mesh.fsdp = 3"),
        ([CONFIG, "--topologie", "cpu:8"], "there is no such field"),
        ([CONFIG, "--json", "/nowhere/plan.json"], "can't be written to: name another folder"),
    ],
)
def test_wrong_use(args, message, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert command(*args) == 2
    assert message in capsys.readouterr().err


def test_help(capsys):
    assert command("--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in ("--topology T", "--slices N", "--find-batch", "--json OUT", "v5e:16x16", "h100:8"):
        assert part in said
    assert command(CONFIG, "--help") == 0
    said = capsys.readouterr().out
    assert "--train.batch-size" in said
    assert "clipjax plan" in said


# For TPUs

TPU = pytest.importorskip  # the compiler is libtpu's
SMALL = dict(width=128, depth=1, heads=2, mlp_dim=128)


def for_tpu(**changes):
    image = config.ImageTower(image_size=16, patch_size=8, embed_dim=128, pool="mean", pre_norm=False, **SMALL)
    text = config.TextTower(length=8, vocab_size=256, embed_dim=128, pool="last", **SMALL)
    model = config.Model(image=image, text=text, init_bias=-10.0, init_scale=10.0)
    train = config.Train(steps=20, batch_size=64)
    return config.Run(
        **(
            dict(data=config.Data(spec="emoji"), model=model, objective=(config.Sigmoid(),), train=train, optim=tiny.OPTIM)
            | changes
        )
    )


def test_a_run_for_a_tpu():
    TPU("libtpu", reason="the TPU compiler: pip install libtpu")
    cfg = for_tpu()
    found, _ = planned(cfg, "v5e:2x2")
    assert (found.chips, found.devices, found.device_kind) == (4, 4, "TPU v5 lite")
    assert found.fits
    assert 15 * 2**30 < found.capacity_bytes < 16 * 2**30
    assert sum(found.memory.values()) == found.peak_bytes_per_chip
    assert abs(found.memory["padding"]) < 0.4 * found.argument_bytes  # tiles of 8 x 128, of small shards
    assert "all-reduce" in found.collectives
    assert found.memory["optimizer state"] < 0.3 * 2 / 3 * found.state_bytes  # mesh.shard_optimizer
    assert found.collectives["reduce-scatter"]["bytes"] > 0.2 * found.state_bytes
    assert found.program_flops >= 0.9 * found.flops_per_step
    assert 0 < found.estimate.step_seconds < 0.1
    assert 0 < found.estimate.mfu < 1
    own = found.estimate.compiler
    assert (own.clock_hz, own.seconds) == (1.5e9, own.cycles / 1.5e9)
    assert own.seconds > found.estimate.seconds["compute"]
    parts = dict(own.parts)
    assert parts.pop("collectives") == found.estimate.seconds["links"]
    assert sum(parts.values()) == pytest.approx(own.seconds)
    assert parts.keys() >= {"products", "attention scores", "norms", "text tower", "loss", "optimizer and norms"}
    assert own.mfu * own.seconds == pytest.approx(found.estimate.mfu * found.estimate.step_seconds)
    assert own.uncosted["all-reduce"] > 0
    said = "\n".join(report.lines(found))
    assert f"{own.seconds:.4f} s a step" in said
    assert "without an estimate: copy-" in said


# Three minutes. In CI: the search on this machine above, and in test_aot.py a TPU's refusal.
@pytest.mark.slow
@pytest.mark.recipes
def test_the_largest_batch_for_a_tpu():
    TPU("libtpu", reason="the TPU compiler: pip install libtpu")
    cfg = for_tpu()
    target = plan.make_target(cfg, "v5e:1x1")
    found, fixed = plan.make_plan(cfg, target)
    reported = []
    found = plan.with_largest_batch(cfg, target, found, fixed, reported.append, lambda size: pytest.MonkeyPatch.context())
    needed = {t.batch_size: t.needed for t in found.tries if t.needed}
    assert found.largest_batch > 2**15
    assert needed[found.largest_batch] <= target.capacity < needed[2 * found.largest_batch]
    assert len(reported) == len(found.tries) - 1 < 6


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_kind_of_tpu(topology):
    TPU("libtpu", reason="the TPU compiler: pip install libtpu")
    found, _ = planned(for_tpu(), topology)
    assert found.chips == 4
    assert found.fits
    assert found.estimate.bound is not None
    assert found.estimate.lacks == ()


@pytest.mark.slow
def test_slices_send_over_the_network():
    TPU("libtpu", reason="the TPU compiler: pip install libtpu")
    cfg = for_tpu()
    found, _ = plan.make_plan(cfg, plan.make_target(cfg, "v5e:2x2", 2))
    assert (found.slices, found.chips) == (2, 8)
    assert any(kind.endswith("between slices") for kind in found.collectives)
    assert found.estimate.seconds["network"] > 0
