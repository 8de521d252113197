"""Clock, FLOPs against the traced program, writers through kill and resume."""

import contextlib
import io
import json
import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from clipjax import sharding
from clipjax.chips import chip_of
from clipjax.config import ImageTower, Mesh, Model, Rule, TextTower
from clipjax.metrics.clock import Clock
from clipjax.metrics.counts import BadExamples, DataCounts, Interval, TooManyBadError
from clipjax.metrics.flops import mfu, model_flops, peak_flops
from clipjax.metrics.writer import MetricsWriter, NonFiniteError
from clipjax.models import clip
from clipjax.train.optimizer import stop_frozen, trained_names
from tests.train import tiny


class Time:
    """A clock that a test sets."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


def test_clock_leaves_pauses_out_and_starts_anew():
    now = Time()
    clock = Clock(now)
    for _ in range(4):
        with clock.waiting():
            now.seconds += 0.5
        now.seconds += 1.5
        clock.count(16)
    with clock.paused(after={"x": jnp.ones(3)}):
        now.seconds += 2
        with clock.spending("eval_seconds"):
            now.seconds += 4
        for _ in range(2):
            with clock.spending("save_seconds"):
                now.seconds += 1
    spent = {"save_seconds": 2.0, "eval_seconds": 4.0}
    assert clock.read() == {"examples_per_second": 8.0, "data_wait": 0.25, "useful_share": 6 / 16} | spent
    now.seconds += 2
    clock.count(16)
    spent = {"save_seconds": 0.0, "eval_seconds": 0.0}
    assert clock.read() == {"examples_per_second": 8.0, "data_wait": 0.0, "useful_share": 1.0} | spent
    with clock.paused():  # the first step: compilation
        now.seconds += 3
    now.seconds += 1
    assert clock.read() == {"useful_share": 0.0} | spent


def test_clock_counts_a_wait_and_what_failed():
    now = Time()
    clock = Clock(now)
    clock.count(16)
    with contextlib.suppress(StopIteration), clock.waiting():
        now.seconds += 3
        next(iter(()))
    now.seconds += 1
    with contextlib.suppress(OSError), clock.paused(), clock.spending("eval_seconds"):
        now.seconds += 4
        raise OSError
    read = clock.read()
    assert (read["data_wait"], read["eval_seconds"], read["useful_share"]) == (0.75, 4.0, 0.125)


def dots(jaxpr):
    """2 m n k of every dot product in a traced program, scans unrolled."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        for inner in jaxprs_in_params(eqn.params):
            total += dots(inner) * eqn.params.get("length", 1)
    return total


SMALL = dict(width=64, depth=3, heads=2, mlp_dim=144)
MODELS = {
    "clip": (
        ImageTower.clip("Ti/8", image_size=32, embed_dim=48, **SMALL),
        TextTower.clip("Ti", length=10, embed_dim=48, **SMALL),
    ),
    "siglip": (
        ImageTower.siglip("Ti/8", image_size=32, **SMALL),
        TextTower.siglip("Ti", length=12, embed_dim=64, **SMALL),
    ),
    "flip": (
        ImageTower(image_size=32, patch_size=4, pool="mean", patch_dropout=0.4, embed_dim=64, **SMALL),
        TextTower(length=9, embed_dim=None, **SMALL),
    ),
}  # fmt: skip


def test_counts_of_the_newest_step_are_not_waited_for(monkeypatch):
    """The devices may still compute them, and all the steps before."""

    class Running(dict):
        finished = False

        def __getitem__(self, name):
            assert self.finished, "waits for the newest step"
            return super().__getitem__(name)

    counts = DataCounts(sharding.make_mesh(Mesh(data=8)))
    add_up = counts._add_up
    monkeypatch.setattr(counts, "_add_up", lambda rows: (Running(add_up(rows)[0]), add_up(rows)[1]))
    flags = tiny.marks(6, bad=2) | {"truncated": np.ones((6, 3), bool)}
    read = []
    for _ in range(3):
        for before in read:  # a log interval later, the devices are that far
            before.finished = True
        counts.count(flags)
        counts.count(flags)
        read.append(counts.read())
    read[-1].finished = True
    assert [(found["replaced"], found["truncated"]) for found in read] == [(4, 36)] * 3
    assert all(found["replaced"].dtype == np.int32 and found["replaced"].shape == () for found in read)
    assert [found["bad_share"] for found in read] == [np.float32(1 / 3)] * 3
    assert counts.total == {"replaced": 12, "filtered": 0, "truncated": 108}
    assert type(counts.total["replaced"]) is int


def intervals(*bad, examples=640):
    found = BadExamples(0.1)
    for number, count in enumerate(bad):
        found.add(Interval(examples, (0, 0, count, 0), 10 + number if count else -1, 2 if count else 0))
    return found


@pytest.mark.parametrize(
    ("bad", "examples"),
    [
        ([63], 63),  # all of them, but fewer than 64
        ([64], 640),  # exactly the share
        ([0, 1000], 5000),  # exactly the share of the last 10,000
        ([*[1000] * 9, *[0] * 9], 2000),  # half of all, but not of the last 10,000
        ([0, 1000, 0], 10_000),  # intervals longer than what is looked back at
    ],
)
def test_as_many_bad_examples_as_are_allowed_end_no_run(bad, examples):
    intervals(*bad, examples=examples).check(None)


@pytest.mark.parametrize(
    ("bad", "examples", "share"),
    [
        ([64], 64, "64 of the last 64"),
        ([64], 639, "64 of the last 639"),
        ([0, 1001], 5000, "1,001 of the last 10,000"),
        ([*[0] * 90, 900, 101], 1000, "1,001 of the last 10,000"),
        ([0, 1001], 10_000, "1,001 of the last 10,000"),
    ],
)
def test_one_more_does(bad, examples, share):
    first = 10 + next(i for i, count in enumerate(bad) if count)
    with pytest.raises(TooManyBadError) as raised:
        intervals(*bad, examples=examples).check(None)
    named = f"examples are bad (has no caption: {share.split()[0]}); the first is number {first}, which has no caption"
    assert str(raised.value) == f"data.max_bad = 0.1: {share} {named}"


@pytest.mark.parametrize("name", MODELS)
def test_model_flops_are_those_of_the_traced_program(name):
    image, text = MODELS[name]
    cfg, b = Model(image=image, text=text), 5

    def forward(params, images, tokens, keys):
        model = clip.bind(cfg, params)
        return model.encode_image(images, keys), model.encode_text(tokens)

    params = jax.eval_shape(lambda: clip.init(cfg, 0))
    shapes = jax.eval_shape(lambda: (jnp.zeros((b, 32, 32, 3), jnp.uint8), jnp.zeros((b, text.length), jnp.int32)))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), b))
    traced = dots(jax.make_jaxpr(forward)(params, *shapes, keys).jaxpr)
    if image.pool == "map":
        traced -= 2 * image.width**2  # the probe's query, once a batch
    assert model_flops(cfg) == 3 * traced / b


@pytest.mark.parametrize(("frozen", "passes"), [
    (r"image/.*", (1, 3)), (r"image/(?!norm|projection).*", (1, 3)), (r"text/(?!tokens).*", (3, 2)), (r"text/tokens", (3, 3)),
    (r"(image|text)/.*", (1, 1)), (r"log_scale", (3, 3)),
])  # fmt: skip
def test_what_is_frozen_needs_less(frozen, passes):
    image, text = MODELS["clip"]
    cfg, b = Model(image=image, text=text), 5
    params = jax.eval_shape(lambda: clip.init(cfg, 0))
    rules = (Rule(pattern=frozen, lr=0.0), Rule(pattern=".*"))
    shapes = jax.eval_shape(lambda: (jnp.zeros((b, 32, 32, 3), jnp.uint8), jnp.zeros((b, text.length), jnp.int32)))

    def loss(params, images, tokens):
        model = clip.bind(cfg, stop_frozen(rules, params))
        return (model.encode_image(images) * model.encode_text(tokens)).sum() * model.log_scale[...]

    made = model_flops(cfg, trained_names(rules, params))
    facts = clip.facts(cfg)
    assert made == passes[0] * facts["image"].flops + passes[1] * facts["text"].flops
    # Images need no gradient; frozen attention still passes one to each of two factors.
    assert made == pytest.approx(dots(jax.make_jaxpr(jax.grad(loss))(params, *shapes).jaxpr) / b, rel=0.05)


def test_model_flops_of_published_sizes():
    """open_clip's model profile, GFLOPs of one forward pass."""
    image, text = ImageTower.clip("B/16"), TextTower.clip("B")
    facts = clip.facts(Model(image=image, text=text))
    assert facts["image"].flops / 1e9 == pytest.approx(35.13, abs=0.01)
    assert facts["text"].flops / 1e9 == pytest.approx(5.96, abs=0.01)
    assert model_flops(Model(image=image, text=text)) / 3e9 == pytest.approx(41.09, abs=0.01)
    siglip = Model(image=ImageTower.siglip("B/16"), text=TextTower.siglip("B"))
    assert model_flops(siglip) / 3e9 == pytest.approx(46.44, abs=0.01)
    large = Model(image=ImageTower.clip("L/14"), text=TextTower.clip("L"))
    assert model_flops(large) / 3e9 == pytest.approx(175.33, abs=0.02)


@pytest.mark.parametrize(("kind", "peak"), [
    ("TPU v3", 61.5e12), ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12),
    ("TPU7x", 1153.5e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA L4", 121e12),
    ("NVIDIA L40S", 362e12), ("NVIDIA L40", None), ("NVIDIA A10G", None), ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("NVIDIA B200", 2250e12), ("cpu", None),
])  # fmt: skip
def test_peak_of_one_device(kind, peak):
    assert peak_flops(kind) == peak


@pytest.mark.parametrize(("kind", "gigabytes"), [
    ("NVIDIA A100-SXM4-40GB", 40), ("NVIDIA A100-SXM4-80GB", 80), ("NVIDIA A100 80GB PCIe", 80), ("NVIDIA A100-PCIE-40GB", 40),
    ("NVIDIA H100 80GB HBM3", 80), ("NVIDIA H100 NVL", 94), ("TPU v5 lite", 16),
])  # fmt: skip
def test_memory_is_that_of_the_name(kind, gigabytes):
    assert chip_of(kind).capacity == gigabytes * 1e9


def test_utilisation():
    class Device:
        device_kind = "TPU v5 lite"

    assert mfu(1e14, [Device()] * 4) == pytest.approx(1e14 / (4 * 197e12))
    assert mfu(1e14, jax.devices()) is None


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def scalars(*values, name="loss"):
    return [{name: jnp.float32(v)} for v in values]


def test_lines_are_an_interval_late_and_complete(tmp_path):
    writer = MetricsWriter(tmp_path)
    lines = []
    for step in range(1, 7):
        host = {"examples_per_second": 10.0 * step, "mfu": None} if step % 2 == 0 else None
        lines.append(writer.push(step, {"loss": jnp.float32(step / 10), "lr": jnp.float32(1e-3)}, host))
        assert len(records(tmp_path)) == max(0, step // 2 - 1)
    assert [line and line["step"] for line in lines] == [None, None, None, 2, None, 4]
    assert lines[3]["examples_per_second"] == 20
    writer.evaluation(6, "zeroshot_retrieval", {"image_retrieval_recall@1": 0.5, "x": math.nan}, dataset="emoji")
    assert writer.flush()["step"] == 6
    assert writer.flush() is None
    writer.close()
    assert records(tmp_path) == [
        {"step": 2, "loss": 0.2, "lr": 0.001, "examples_per_second": 20, "mfu": None},
        {"step": 4, "loss": 0.4, "lr": 0.001, "examples_per_second": 40, "mfu": None},
        {"step": 6, "task": "zeroshot_retrieval", "dataset": "emoji", "metrics": {"image_retrieval_recall@1": 0.5, "x": None}},
        {"step": 6, "loss": 0.6, "lr": 0.001, "examples_per_second": 60, "mfu": None},
    ]


def test_images_go_to_the_board_alone(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    writer = MetricsWriter(tmp_path)
    assert writer.evaluation(3, "captioning", {"bleu": 2.5, "samples": image}, dataset="emoji/test") == {"bleu": 2.5}
    writer.close()
    assert records(tmp_path) == [{"step": 3, "task": "captioning", "dataset": "emoji/test", "metrics": {"bleu": 2.5}}]
    ((_, tags),) = events(tmp_path)
    assert tags == {"captioning/emoji/test/bleu": (3, 2.5), "captioning/emoji/test/samples": (3, 0)}
    (file,) = (tmp_path / "tensorboard").iterdir()
    data = file.read_bytes()
    start = data.index(b"\x89PNG")
    with Image.open(io.BytesIO(data[start:])) as shown:
        np.testing.assert_array_equal(np.asarray(shown), image)


def test_written_float32_is_exact(tmp_path):
    values = np.random.default_rng(0).normal(size=200).astype(np.float32)
    writer = MetricsWriter(tmp_path)
    for step, value in enumerate(values, 1):
        writer.push(step, {"loss": jnp.asarray(value)}, {})
    writer.flush()
    writer.close()
    assert np.array_equal(np.float32([r["loss"] for r in records(tmp_path)]), values)


@pytest.mark.parametrize("name", MetricsWriter.CHECKED)
def test_the_first_bad_step_is_named_though_no_line_was_due(name, tmp_path):
    writer = MetricsWriter(tmp_path)
    for step, values in enumerate(scalars(1, 2, 3, math.inf, math.nan, math.nan, name=name), 1):
        writer.push(step, values)
    writer.push(7, *scalars(1, name=name), {})
    with pytest.raises(FloatingPointError, match=f"^{name} = inf at step 4$") as caught:
        writer.push(8, *scalars(1, name=name), {})
    assert isinstance(caught.value, NonFiniteError)
    assert caught.value.step == 4
    writer.close()


def test_flush_checks_what_no_line_has_covered_yet(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.push(1, *scalars(1), {})
    writer.push(2, *scalars(math.nan))
    with pytest.raises(FloatingPointError, match="loss = nan at step 2"):
        writer.flush()
    writer.close()
    assert records(tmp_path) == [{"step": 1, "loss": 1.0}]


def events(workdir):
    """(purge step, {tag: step}) of each event file in order of writing: length, its checksum, data, its checksum."""
    files = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data, purge, tags = path.read_bytes(), None, {}
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            purge = event.step if event.HasField("session_log") else purge
            tags |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        files.append((purge, tags))
    return files


def test_resume_removes_torn_lines_and_all_past_the_restored_step(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step, values in enumerate(scalars(5, 4, 3, 2), 1):
        writer.push(step, values, {})
        writer.evaluation(step, "zeroshot_classification", {"acc1": step / 10})
    writer.flush()
    writer.close()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 2, "loss": 0.1')  # killed in the middle of a line

    writer = MetricsWriter(tmp_path, step=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]
    assert [(r["step"], r.get("loss")) for r in records(tmp_path)] == [(1, None), (1, 5), (2, None), (2, 4)]
    writer.push(3, *scalars(3), {})
    writer.push(4, *scalars(2), {})
    writer.flush()
    writer.close()
    assert [r["step"] for r in records(tmp_path)] == [1, 1, 2, 2, 3, 4]
    (_, first), (purge, second) = events(tmp_path)
    assert first == {"loss": (4, 2.0), "zeroshot_classification/acc1": (4, pytest.approx(0.4))}
    assert (purge, second) == (3, {"loss": (4, 2.0)})

    before = path.stat().st_mtime_ns
    MetricsWriter(tmp_path, step=4).close()
    assert path.stat().st_mtime_ns == before  # nothing to remove: not written again
    MetricsWriter(tmp_path).close()
    assert records(tmp_path) == []  # from the start


def test_other_processes_check_but_do_not_write(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = MetricsWriter(tmp_path / "run")
    writer.push(1, *scalars(1), {})
    assert writer.flush() == {"step": 1, "loss": 1.0}
    writer.evaluation(1, "t", {"acc1": 1.0})
    writer.push(2, *scalars(math.nan), {})
    with pytest.raises(FloatingPointError):
        writer.flush()
    writer.close()
    assert not (tmp_path / "run").exists()
