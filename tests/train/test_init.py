"""A new workdir that starts from the weights of other runs."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import config, sharding
from clipjax.checkpoint import save_weights
from clipjax.config import ConfigError, Init
from clipjax.models import clip
from clipjax.models.lora import LORA_A, LORA_B, merged
from clipjax.models.positions import resized_image, resized_text
from clipjax.train.optimizer import make_optimizer
from clipjax.train.weights import started_state
from clipjax.train.workdir import save_config
from tests.train import tiny

TRAIN = config.Train(steps=2, batch_size=16, log_every=1, checkpoint_every=9)
OPTIM = config.Optim(lr=1e-3, schedule=config.Cosine(warmup=1))


def flat(tree):
    return {sharding.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def drawn(model, seed):
    """Parameters without zeros, so that none is like another run's by chance. The scale is within its bounds."""
    params, rng = clip.init(model, seed), np.random.default_rng(seed)
    noisy = jax.tree.map(lambda x: np.asarray(x + 0.02 * rng.standard_normal(x.shape), np.float32), params)
    return noisy


def start(folder, model, seed=1, **changes):
    """A workdir with weights alone, as `import` writes one; its parameters by their paths."""
    run, params = tiny.run(model, **changes), drawn(model, seed)
    save_weights(folder, run, params, "a test")
    save_config(run, folder)
    return flat(params)


def towers(model, image=None, text=None, **changes):
    image, text = (dataclasses.replace(getattr(model, n), **(c or {})) for n, c in (("image", image), ("text", text)))
    return dataclasses.replace(model, image=image, text=text, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of several models: name -> path; and their parameters."""
    root = tmp_path_factory.mktemp("starts")
    eot = dict(tokenizer=config.BPE(clean="web"))
    made = {
        "clip": start(root / "clip", tiny.CLIP, 1, data=config.Data(spec="emoji", resize="crop")),
        "other": start(root / "other", tiny.CLIP, 2, **eot),
        "siglip": start(root / "siglip", tiny.SIGLIP, 3),
        "coca": start(root / "coca", tiny.COCA, 4),
        "image": start(root / "image", dataclasses.replace(tiny.CLIP, towers="image"), 5),
    }
    return root, made


def begun(run, workdir, mesh=None):
    """The first state, by paths, and the report."""
    mesh, found = mesh or tiny.mesh_of(), tiny.opened(run, workdir)
    tx = make_optimizer(run.optim, run.train.steps, jax.eval_shape(lambda: clip.init(run.model, run.seed)))
    state = started_state(run, found.origin, tx, mesh)
    return state, "\n".join(found.origin.report(run))


def from_weights(model, *, init, **changes):
    return tiny.run(model, init=init, **dict(train=TRAIN, optim=OPTIM) | changes)


def same(got, want, names):
    for name in names:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def new(run):
    return flat(jax.jit(lambda: clip.init(run.model, run.seed))())


def test_all_of_one_run(runs, tmp_path):
    """The weights bit for bit; the rest of the state is that of a new run, and the moving average begins with the weights."""
    root, made = runs
    run = from_weights(tiny.CLIP, init=Init(run=f"{root}/clip@0"), optim=dataclasses.replace(OPTIM, ema=0.9))
    state, report = begun(run, tmp_path)
    assert flat(state.params).keys() == made["clip"].keys()
    same(flat(state.params), made["clip"], made["clip"])
    same(flat(state.ema), made["clip"], made["clip"])
    assert int(state.step) == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(state.opt_state))
    assert jax.tree.leaves(state.opt_state)
    count = sum(x.size for x in made["clip"].values())
    assert f"came: {count:,} parameters in {len(made['clip'])} arrays\nresized: 0 parameters" in report
    assert "new: 0 parameters in 0 arrays\nleft: 0 parameters in 0 arrays\n" in report
    assert "data.resize: 'crop' in " in report
    assert f"the tokenizer is that of {root}/clip; tokenizer.clean = 'none'" in report


def test_towers_of_two_runs(runs, tmp_path):
    """And scale and bias of neither: no scale belongs to these two. With `run`, they are its own."""
    root, made = runs
    web = dict(tokenizer=config.BPE(clean="web"))
    run = from_weights(tiny.CLIP, init=Init(image=f"{root}/clip", text=f"{root}/other"), **web)
    state, report = begun(run, tmp_path)
    got = flat(state.params)
    same(got, made["clip"], [n for n in got if n.startswith("image/")])
    same(got, made["other"], [n for n in got if n.startswith("text/")])
    assert got["log_scale"] == np.float32(math.log(run.model.init_scale)) != made["other"]["log_scale"]
    assert "new: 1 parameters in 1 arrays: log_scale\n" in report
    run = from_weights(tiny.CLIP, init=Init(run=f"{root}/clip", text=f"{root}/other"), **web)
    got = flat(begun(run, tmp_path)[0].params)
    assert got["log_scale"] == made["clip"]["log_scale"]
    same(got, made["other"], ["text/tokens"])
    same(got, made["clip"], ["image/patch/kernel"])
    assert tiny.opened(run, tmp_path).origin.tokenizer == root / "other"


def test_one_tower_and_a_new_one(runs, tmp_path):
    """Of an image tower that was imported alone. The text tower has another width, and a tokenizer of its own."""
    root, made = runs
    wide = towers(tiny.CLIP, text=dict(width=48))
    run = from_weights(wide, init=Init(image=f"{root}/image"), tokenizer=config.BPE(clean="canonicalize"))
    state, report = begun(run, tmp_path)
    got, fresh = flat(state.params), new(run)
    same(got, made["image"], made["image"])
    same(got, fresh, fresh.keys() - made["image"].keys())
    assert tiny.opened(run, tmp_path).origin.tokenizer is None
    assert "new: 52,161 parameters in 18 arrays: log_scale, text/... (17)\n" in report
    with pytest.raises(ConfigError, match=r"^init\.run = '.*image': has no text tower: name the run of one by init\.text, or"):
        tiny.opened(from_weights(tiny.CLIP, init=Init(run=f"{root}/image")), tmp_path)


@pytest.mark.parametrize(("size", "length"), [(24, 5), (40, 13), (20, 8)])
def test_another_size_and_length(runs, tmp_path, size, length):
    """What becomes of positions is tested in models/test_positions.py. 20 px are two patches of 8, as 16 are: the same ones."""
    root, made = runs
    run = from_weights(towers(tiny.CLIP, dict(image_size=size), dict(length=length)), init=Init(run=f"{root}/clip"))
    state, report = begun(run, tmp_path)
    got, side = flat(state.params), size // 8
    same(got, made["clip"], got.keys() - {"image/positions", "text/positions"})
    np.testing.assert_array_equal(got["image/positions"], resized_image(made["clip"]["image/positions"], True, side))
    np.testing.assert_array_equal(got["text/positions"], resized_text(made["clip"]["text/positions"], length, False))
    if side != 2:
        assert f"image/positions [5, 32] -> [{side * side + 1}, 32], bicubic" in report
        assert f"text/positions [8, 32] -> [{length}, 32], {'the first ones' if length < 8 else 'linear in between'}" in report
    else:
        assert "resized: 0 parameters" in report


def test_a_captioner_at_another_length_and_without_its_head(runs, tmp_path):
    root, made = runs
    run = from_weights(towers(tiny.COCA, text=dict(length=12)), init=Init(run=f"{root}/coca"))
    got = flat(begun(run, tmp_path)[0].params)
    same(got, made["coca"], got.keys() - {"text/positions", "decoder/masks"})
    np.testing.assert_array_equal(got["text/positions"][-1], made["coca"]["text/positions"][-1])  # of the class token
    assert got["decoder/masks"].shape == (11, 32)
    without = dataclasses.replace(tiny.COCA, decoder=None)
    with pytest.raises(
        ConfigError, match=r"init\.allow = \('decoder/\.\*',\):\n  decoder/.*\n(  decoder/.*\n){7}  and \d+ more$"
    ):
        tiny.opened(from_weights(without, init=Init(run=f"{root}/coca")), tmp_path)
    run = from_weights(without, init=Init(run=f"{root}/coca", allow=("decoder/.*",)))
    state, report = begun(run, tmp_path)
    same(flat(state.params), made["coca"], flat(state.params))
    assert "left: " in report
    assert "decoder/... (" in report


def test_bias_and_scale_of_another_loss(runs, tmp_path):
    """A softmax sees no bias; a sigmoid's scale and bias are not those of a softmax. Both are told."""
    root, made = runs
    model = dataclasses.replace(tiny.SIGLIP, init_bias=None)
    state, report = begun(from_weights(model, init=Init(run=f"{root}/siglip")), tmp_path)
    got = flat(state.params)
    assert "bias" not in got
    same(got, made["siglip"], got)
    assert "the bias of " in report
    assert "left: 1 parameters in 1 arrays: bias" in report
    model = dataclasses.replace(tiny.CLIP, init_bias=-10.0, init_scale=10.0, max_scale=None)
    state, report = begun(from_weights(model, init=Init(run=f"{root}/clip")), tmp_path)
    got = flat(state.params)
    same(got, made["clip"], got.keys() - {"bias", "log_scale"})
    assert (got["bias"], got["log_scale"]) == (-10, np.float32(math.log(10)))
    assert "has no bias" in report
    assert "new: 2 parameters in 2 arrays: log_scale, bias" in report


def test_adapters_are_new_and_those_of_the_start_are_merged(tmp_path):
    lora = config.Lora(rank=2)
    before = towers(tiny.CLIP, dict(lora=lora))
    start(tmp_path / "start", before)
    want = flat(merged(before, drawn(before, 1))[1])
    for model in (tiny.CLIP, towers(tiny.CLIP, text=dict(lora=lora)), before):
        run = from_weights(model, init=Init(run=str(tmp_path / "start")))
        got, fresh = flat(begun(run, tmp_path / "new")[0].params), new(run)
        adapters = {name for name in got if name.endswith((LORA_A, LORA_B))}
        assert bool(adapters) == (model != tiny.CLIP)
        same(got, want, got.keys() - adapters)
        same(got, fresh, adapters)


WIDER = towers(tiny.CLIP, dict(mlp_dim=48))
UNFIT = {
    "shape": (
        WIDER,
        r"init\.run = .*start_from.*init\.allow = \(.*\n  image/blocks/mlp/down/kernel: \[2, 48, 32\] here, \[2, 64, 32\] t",
    ),
    "new": (
        towers(tiny.CLIP, dict(patch_bias=True)),
        r".*init\.allow = \('image/patch/bias',\):\n  .*: \[32\] here, none of this name",
    ),
    "left": (
        towers(tiny.CLIP, dict(pre_norm=False)),
        r".*allow = \('image/pre_norm/bias', 'image/pre_norm/scale'\):\n.*: \[32\] there, none",
    ),
    "field": (
        towers(tiny.CLIP, dict(activation="quick_gelu"), dict(norm_eps=1e-6)),
        r".*allow = \('model\.image\.activation', 'model\.text\.norm_eps'\):\n.*: 'gelu' -> 'quick_gelu'\n.*: 1e-05 -> 1e-06$",
    ),
    "heads": (towers(tiny.CLIP, text=dict(heads=2)), r".*\n  text/blocks/attention/out/kernel: \[2, 2, 16, 32\] here, \[2, 4, 8"),
    "vocabulary": (
        towers(tiny.CLIP, text=dict(vocab_size=500)),
        r".*\('text/tokens',\):\n.*: \[500, 32\] here, \[400, 32\] there$",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_match_is_refused_by_name_unless_it_is_allowed(runs, tmp_path, name):
    root, made = runs
    model, message = UNFIT[name]
    with pytest.raises(ConfigError, match=f"(?s)^{message}") as refused:
        tiny.opened(from_weights(model, init=Init(run=f"{root}/clip")), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    text = str(refused.value)
    allow = eval(text[text.index("init.allow = ") + len("init.allow = ") : text.index(":\n")])
    run = from_weights(model, init=Init(run=f"{root}/clip", allow=allow))
    got, fresh = flat(begun(run, tmp_path / "new")[0].params), new(run)
    came = {n for n, x in got.items() if n in made["clip"] and made["clip"][n].shape == x.shape}
    same(got, made["clip"], came)
    same(got, fresh, got.keys() - came)


def test_other_values_that_do_not_fit(runs, tmp_path):
    root, _ = runs
    cases = (
        (tiny.CLIP, {}, "nowhere", r"init\.run = '.*nowhere': is not a workdir"),
        (tiny.CLIP, {}, "clip@3", r"init\.run = '.*clip@3': has checkpoints of steps 0 only"),
        (tiny.CLIP, {}, "other", r"tokenizer\.clean = 'none': the token vectors of .*other@0 are of texts .* by 'web': set it"),
        (
            dataclasses.replace(tiny.SIGLIP, max_scale=9.0, init_scale=5.0),
            {},
            "siglip",
            r"model\.max_scale = 9\.0: the scale of .* is 9\.\d",
        ),
        (tiny.CLIP, dict(train=TRAIN), "clip", None),
    )
    for model, changes, name, message in cases:
        run = from_weights(model, init=Init(run=f"{root}/{name}"), **changes)
        with pytest.raises(ConfigError, match=f"^{message}") if message else contextlib.nullcontext():
            assert tiny.opened(run, tmp_path).origin


def batches(run):
    made = [batch | tiny.marks(16) for batch in tiny.batches(run, 9)]
    return lambda begin: contextlib.nullcontext(iter(itertools.islice(made, begin, None)))


class Sum:
    """An evaluator whose metric tells one set of weights from another."""

    task, dataset = "sum", "none"

    def due(self, step):
        return step == 2

    def run(self, params, step):
        return {"sum": float(sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(params)))}


def evaluated(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["metrics"]["sum"] for line in lines if "task" in line}


def test_a_run_evaluates_its_start_and_needs_it_no_more(runs, tmp_path, capsys):
    """Another start, or none, refuses nothing when it resumes. Step 0 is evaluated once, before or after an interruption."""
    root, made = runs
    shutil.copytree(root / "clip", tmp_path / "moved")
    run = from_weights(tiny.CLIP, init=Init(run=str(tmp_path / "moved")))
    workdir, mesh = tmp_path / "new", tiny.mesh_of()
    state = tiny.train_in(workdir, run, batches(run), [Sum()], mesh)
    said = capsys.readouterr().err
    assert f"{workdir}: starts from the weights of {tmp_path}/moved@0 (init.run), at step 0 of 2\n  came: " in said
    assert int(state.step) == 2
    want = sum(np.abs(x).sum(dtype=np.float64) for x in made["clip"].values())
    assert evaluated(workdir).keys() == {0, 2}
    assert evaluated(workdir)[0] == pytest.approx(want, rel=1e-5)
    shutil.rmtree(tmp_path / "moved")
    shutil.rmtree(workdir / "checkpoints" / "2")
    (workdir / "metrics.jsonl").unlink()
    for init in (None, Init(run="elsewhere"), Init(image="elsewhere", text="there")):
        resumed = tiny.train_in(workdir, dataclasses.replace(run, init=init), batches(run), [Sum()], mesh)
        same(flat(resumed.params), flat(state.params), made["clip"])
        assert config.from_json((workdir / "config.json").read_text()).init == (init or run.init)
        assert evaluated(workdir).keys() == {0, 2}
        shutil.rmtree(workdir / "checkpoints" / "2")
    assert "is not read: what came from it stands in the checkpoint" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"^init\.run = 'a': .* has checkpoints"):
        tiny.opened(dataclasses.replace(run, init=Init(run="a", state="all")), workdir)


def test_over_several_devices(runs, tmp_path):
    """Weights are sharded as in training; positions that are resized, too."""
    root, made = runs
    mesh = tiny.mesh_of(2, 2, 2)
    run = from_weights(towers(tiny.CLIP, dict(image_size=32)), init=Init(run=f"{root}/clip"))
    state, _ = begun(run, tmp_path, mesh)
    got = flat(state.params)
    same(got, made["clip"], got.keys() - {"image/positions"})
    np.testing.assert_array_equal(got["image/positions"], resized_image(made["clip"]["image/positions"], True, 4))
    kernel = state.params["image"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 32)


def test_the_average_is_what_comes(tmp_path):
    """Of a run that has one."""
    before = tiny.run(optim=dataclasses.replace(OPTIM, ema=0.5), train=TRAIN)
    trained = tiny.train_in(tmp_path / "start", before, batches(before), [], tiny.mesh_of())
    state, report = begun(from_weights(tiny.CLIP, init=Init(run=f"{tmp_path}/start")), tmp_path / "new")
    same(flat(state.params), flat(trained.ema), flat(trained.ema))
    assert not np.array_equal(flat(trained.ema)["text/tokens"], flat(trained.params)["text/tokens"])
    assert f"the weights of {tmp_path}/start@2 are its moving average" in report


PROGRAM = """
import sys
import jax
import numpy as np
from clipjax import config, sharding
from clipjax.train.optimizer import optimizer_of
from clipjax.train.weights import find_weights, started_state
from clipjax.models import clip

jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
run = config.from_json(open("run.json").read())
mesh, found = sharding.make_mesh(run.mesh), find_weights(run)
state = started_state(run, found, optimizer_of(run, jax.eval_shape(lambda: clip.init(run.model, 0))), mesh)
want, parts = np.load("want.npz"), 0
for path, leaf in jax.tree.leaves_with_path(state.params):
    for shard in leaf.addressable_shards:
        np.testing.assert_array_equal(shard.data, want[sharding.keystr(path)][shard.index])
        parts += shard.data.shape != leaf.shape
print("parts:", parts)
"""


def test_over_two_processes(runs, tmp_path):
    """Each reads its shards; positions are resized from a sharded array."""
    root, made = runs
    model = towers(tiny.CLIP, dict(image_size=32))
    run = from_weights(model, init=Init(run=f"{root}/clip"), mesh=config.Mesh(fsdp=2, data=2))
    (tmp_path / "run.json").write_text(config.to_json(run))
    positions = resized_image(made["clip"]["image/positions"], True, 4)
    np.savez(tmp_path / "want.npz", **made["clip"] | {"image/positions": positions})
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-c", PROGRAM, address]
    started = [subprocess.Popen([*words, str(i)], env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for i in range(2)]
    for process in started:
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 0
        assert int(said.split("parts:")[1]) > 20
