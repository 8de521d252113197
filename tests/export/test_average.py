"""`clipjax average`: weighted means of runs' weights, against float64, and which runs have one."""

import dataclasses
import math

import jax
import numpy as np
import pytest

import clipjax
from clipjax import cli, sharding
from clipjax.checkpoint import Checkpoints
from clipjax.config import Data, Lora, Mesh, Optim, Run
from clipjax.data.tokenizer import Tokenizer
from clipjax.export.formats.table import flatten, unflatten
from clipjax.export.imported import write_weights
from clipjax.models import lora
from clipjax.train.optimizer import make_optimizer
from clipjax.train.state import initial_state
from clipjax.train.workdir import save_config
from tests.export import models

MODEL = models.clip(dtype="float32")


def random(model, seed: int):
    rng = np.random.default_rng(seed)
    return unflatten({name: rng.normal(size=x.shape).astype(np.float32) for name, x in flatten(models.parameters(model))})


def made(out, seed: int, tokenizer, model=MODEL, **fields):
    """A run with random weights. Returns its name and its weights, by their paths."""
    params = random(model, seed)
    words = Tokenizer.load(tokenizer, models.LENGTH)
    write_weights(Run(**dict(data=Data(spec="emoji"), model=model) | fields), params, words, out, "the test")
    return str(out), dict(flatten(params))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("runs")
    found = [made(folder / f"{seed}", seed, tokenizer) for seed in range(3)]
    signed = found[0][1]["image/blocks/mlp/up/bias"]
    signed[0, :2] = -0.0, 1e-42  # whose bits a product could change
    words = Tokenizer.load(tokenizer, models.LENGTH)
    write_weights(Run(data=Data(spec="emoji"), model=MODEL), unflatten(found[0][1]), words, folder / "signed", "the test")
    return (str(folder / "signed"), found[0][1]), *found[1:]


def averaged(*arguments: object) -> dict[str, np.ndarray]:
    """The weights that the command gives, by their paths."""
    assert cli.main(["average", *map(str, arguments)]) == 0
    found = clipjax.load(str(arguments[-1]))
    assert found.step == 0
    return {name: np.asarray(x) for name, x in flatten(jax.device_get(found.params))}


def test_either_end_of_wise_ft_is_a_run_bit_for_bit(runs, tmp_path):
    (a, first), (b, second), _ = runs
    for alpha, want in ((0, first), (1, second)):
        got = averaged(a, b, "--alpha", alpha, "--out", tmp_path / f"{alpha}")
        assert got.keys() == want.keys()
        assert all(got[name].tobytes() == x.tobytes() for name, x in want.items())


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        (["--alpha", 0.3], (0.7, 0.3)),
        (["--alpha", -0.5], (1.5, -0.5)),
        (["--alpha", 1.5], (-0.5, 1.5)),
        ([], (0.5, 0.5)),
        (["--weights", 0.25, 0.75], (0.25, 0.75)),
        (["--weights", 0.5, 0.125, 0.375], (0.5, 0.125, 0.375)),
    ],
)
def test_the_weights_are_the_weighted_mean_and_the_scale_as_it_is_stored(runs, tmp_path, options, weights, capsys):
    used = runs[: len(weights)]
    got = averaged(*(name for name, _ in used), *options, "--out", tmp_path / "out")
    for name, x in got.items():
        want = sum(w * np.float64(params[name]) for w, (_, params) in zip(weights, used, strict=True))
        np.testing.assert_array_equal(x, np.float32(want), err_msg=name)
    assert f"{weights[0]:g} times step 0 of {used[0][0]}" in capsys.readouterr().out
    assert got["log_scale"].shape == ()


def test_what_comes_out_encodes_and_is_exported(runs, tmp_path):
    (a, _), (b, _), _ = runs
    averaged(a, b, "--alpha", 0.5, "--out", tmp_path / "mean")
    loaded = [clipjax.load(name).encode_text(models.CAPTIONS) for name in (a, str(tmp_path / "mean"))]
    assert np.abs(loaded[0] - loaded[1]).max() > 1e-2
    assert cli.main(["export", str(tmp_path / "mean"), "--to", "open_clip", "--out", str(tmp_path / "folder")]) == 0
    assert (tmp_path / "folder" / "tokenizer.json").exists()


def test_moving_averages_steps_and_adapters(runs, tokenizer, tmp_path):
    """Of a run in training: the moving average at the step that is named, with the adapters in the kernels."""
    (a, first), *_ = runs
    towers = dict(image=dataclasses.replace(MODEL.image, unlock=1), text=dataclasses.replace(MODEL.text, lora=Lora(rank=2)))
    adapted = dataclasses.replace(MODEL, **towers, dtype="bfloat16")
    run = Run(data=Data(spec="emoji"), model=adapted, optim=Optim(ema=0.9))
    mesh = sharding.make_mesh(Mesh(), jax.devices()[:1])
    params = random(adapted, 7)
    tx = make_optimizer(run.optim, run.train.steps, params)
    state = dataclasses.replace(initial_state(run, tx, mesh), ema=jax.device_put(params))
    with Checkpoints(tmp_path / "run", run) as checkpoints:
        checkpoints.save(3, dataclasses.replace(state, step=np.int32(3)))
        checkpoints.save(5, dataclasses.replace(state, step=np.int32(5), ema=jax.tree.map(np.zeros_like, params)))
    Tokenizer.load(tokenizer, models.LENGTH).save(tmp_path / "run" / "tokenizer.json")
    save_config(run, tmp_path / "run")
    got = averaged(a, f"{tmp_path / 'run'}@3", "--alpha", 0.5, "--out", tmp_path / "mean")
    merged = {name: np.float64(x) for name, x in flatten(lora.merged(adapted, params)[1])}
    assert got.keys() == merged.keys() == first.keys()
    for name, x in got.items():
        np.testing.assert_allclose(x, (first[name] + merged[name]) / 2, rtol=2e-6, atol=1e-6, err_msg=name)
    saved = clipjax.load(str(tmp_path / "mean")).run
    assert saved.model == dataclasses.replace(MODEL, max_scale=saved.model.max_scale)
    assert (saved.optim.ema, saved.init) == (None, None)


def test_extrapolated_scales_are_not_clamped(tokenizer, tmp_path):
    """They would move at the first update of a run that starts from there."""
    names = []
    for scale in (20.0, 90.0):
        params = random(MODEL, 0) | {"log_scale": np.float32(math.log(scale))}
        words = Tokenizer.load(tokenizer, models.LENGTH)
        write_weights(Run(data=Data(spec="emoji"), model=MODEL), params, words, tmp_path / f"{scale}", "the test")
        names.append(tmp_path / f"{scale}")
    for alpha, most in ((0.5, 100.0), (2, None)):
        averaged(*names, "--alpha", alpha, "--out", tmp_path / f"at {alpha}")
        assert clipjax.load(str(tmp_path / f"at {alpha}")).run.model.max_scale == most


def refused(capsys, *arguments: object) -> str:
    assert cli.main(["average", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_runs_of_other_models_tokenizers_or_preprocessing_are_refused_by_field(runs, tokenizer, tmp_path, capsys):
    (a, _), *_ = runs
    out = tmp_path / "out"
    smaller = models.clip(image=dict(image_size=24))
    biased = dataclasses.replace(MODEL, init_bias=-10.0)
    cases = {
        f"model.image.image_size = 24 in {tmp_path}/0 and 32 in {a}: name runs of one model": dict(model=smaller),
        f"model.init_bias = a number in {tmp_path}/1 and None in {a}": dict(model=biased),
        f"data.resize = 'crop' in {tmp_path}/2 and 'squash' in {a}": dict(data=Data(spec="emoji", resize="crop")),
    }
    for i, (message, fields) in enumerate(cases.items()):
        other, _ = made(tmp_path / f"{i}", 3, tokenizer, **fields)
        assert message in refused(capsys, a, other, "--out", out)
    own = tmp_path / "own.json"
    Tokenizer.train(models.CAPTIONS, 300, True, models.LENGTH).save(own)
    other, _ = made(tmp_path / "tokens", 3, own)
    assert "tokenizer.json = (checksum " in refused(capsys, a, other, "--out", out)
    assert not out.exists()


def test_wrong_use_is_told(runs, tmp_path, capsys):
    (a, _), (b, _), (c, _) = runs
    out = tmp_path / "out"
    assert "--alpha = 0.5: is for two runs, not 3; use --weights" in refused(capsys, a, b, c, "--alpha", 0.5, "--out", out)
    assert "--weights = [0.5, 0.6]: must be 2 finite numbers" in refused(capsys, a, b, "--weights", 0.5, 0.6, "--out", out)
    assert "--weights = [1.0]: must be 2 finite" in refused(capsys, a, b, "--weights", 1, "--out", out)
    assert "must be 2 finite" in refused(capsys, a, b, "--alpha", "nan", "--out", out)
    assert "name two runs or more" in refused(capsys, a, "--out", out)
    assert "has checkpoints of steps 0 only" in refused(capsys, a, f"{b}@7", "--out", out)
    assert "is not a workdir" in refused(capsys, a, tmp_path / "none", "--out", out)
    assert "is not empty" in refused(capsys, a, b, "--out", c)
    assert not out.exists()
