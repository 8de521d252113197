"""`clipjax bench loss`: both forms are the same function, and the figures are those of the requested case."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import cli, config, sharding
from clipjax.bench import LOSSES, loss, loss_forms
from clipjax.losses.pairwise import tiles


def mesh():
    return sharding.make_mesh(config.Mesh(), loss.devices(8, None))


def costs(name, batch, width=16, turns=2, **kw):
    return loss.measure(loss.BenchCase(name, batch, width, mesh(), turns=turns, **kw))


@pytest.mark.parametrize("name", LOSSES)
def test_dense_and_streamed_are_one_function(name):
    args = loss_forms.inputs(name, 64, 16, mesh())
    np.testing.assert_allclose(jnp.linalg.norm(args[0], axis=1), 1, rtol=1e-6)
    forms = loss_forms.streamed(name, mesh()), loss_forms.dense(name)
    both = [loss_forms.lower(fn, name, 64, 16, mesh()).compile()(*args) for fn in forms]
    for got, want in zip(*(jax.tree.leaves(x) for x in both), strict=True):
        np.testing.assert_allclose(got, want, rtol=5e-5, atol=5e-5 * np.abs(want).max())
    assert both[0][1][0].sharding.is_equivalent_to(sharding.over_rows(mesh()), 2)


@pytest.mark.parametrize(("name", "products"), [("softmax", 6), ("sigmoid", 6), ("cuaxu", 22)])
def test_dense_costs_what_it_must(name, products):
    """Three products for each matrix. Those of uniformity have one side, and XLA computes its gradient with one product."""
    _, dense = costs(name, 64)
    assert dense.flops == products
    assert dense.form == "dense"


def test_figures_of_both_forms():
    pair = costs("sigmoid", 64, turns=3)
    assert [(x.loss, x.batch, x.form, x.failure) for x in pair] == [
        ("sigmoid", 64, "streamed", None),
        ("sigmoid", 64, "dense", None),
    ]
    for x in pair:
        assert len(x.seconds) == 3
        assert min(x.seconds) > 0
        assert x.argument_bytes == 2 * 8 * 16 * 4 + 2 * 4
        assert x.peak_bytes >= 2 * x.argument_bytes - 2 * 4
        assert x.collectives
    top, bottom = loss.lines(pair)
    assert "streamed" in top
    assert "dense" in bottom


@pytest.mark.parametrize(
    ("travel", "kind", "other"), [("ring", "collective-permute", "all-gather"), ("gather", "all-gather", "collective-permute")]
)
def test_travel_is_as_requested(travel, kind, other):
    before = tiles.GATHER
    streamed, _ = costs("softmax", 64, travel=travel)
    assert kind in streamed.collectives
    assert other not in streamed.collectives
    assert before == tiles.GATHER


def test_a_batch_that_takes_too_long_is_not_timed():
    pair = costs("softmax", 64, patience=0)
    assert [x.seconds for x in pair] == [None, None]
    assert all(x.estimated_seconds > 0 for x in pair)
    assert all("(~0)" in line for line in loss.lines(pair))


def test_what_does_not_fit_is_reported_and_the_other_form_still_timed(monkeypatch):
    streamed, dense = costs("softmax", 1024, travel="ring")
    assert streamed.peak_bytes < dense.peak_bytes
    monkeypatch.setattr(loss.aot, "capacity", lambda devices: dense.peak_bytes - 1)
    streamed, dense = costs("softmax", 1024, travel="ring")
    assert len(streamed.seconds) == 2
    assert dense.seconds is None
    assert dense.failure.startswith("out of memory: needs ")
    assert "out of memory" in list(loss.lines((streamed, dense)))[1]


def test_a_failing_compiler_is_reported(monkeypatch):
    def fails(lowered):
        raise loss.aot.CompilerError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(loss.aot, "compile", fails)
    pair = costs("softmax", 64)
    assert [x.failure for x in pair] == ["the compiler failed: INTERNAL: RET_CHECK failure"] * 2
    assert all(line.endswith("the compiler failed: INTERNAL: RET_CHECK failure") for line in loss.lines(pair))


def test_a_topology_is_compiled_for_and_not_run():
    pytest.importorskip("libtpu", reason="the TPU compiler: pip install libtpu")
    mesh = sharding.make_mesh(config.Mesh(), loss.devices(None, "v5e:2x2"))
    streamed, dense = loss.measure(loss.BenchCase("sigmoid", 2**20, 128, mesh, topology="v5e:2x2"))
    assert (streamed.seconds, dense.seconds) == (None, None)
    assert streamed.flops == 6
    assert streamed.argument_bytes >= 2 * 2**18 * 128 * 4
    assert dense.failure.endswith("of 15.75 GiB a device")
    assert dense.peak_bytes > 2**40 / 4


def test_more_devices_than_there_are():
    with pytest.raises(config.ConfigError, match="--devices = 9: there are 8"):
        loss.devices(9, None)


def run(*args):
    """Exit status of `clipjax bench loss`, however it comes."""
    try:
        return cli.main(["bench", "loss", *(str(a) for a in args)])
    except SystemExit as e:
        return e.code or 0


SMALL = ("--width", 16, "--devices", 4, "--turns", 2)


def test_the_command(tmp_path, capsys):
    out = tmp_path / "new" / "loss.json"
    assert run(*SMALL, "--loss", "sigmoid", "softmax", "--batch", 64, 128, "--travel", "ring", "--json", out) == 0
    said = capsys.readouterr()
    table = said.out.splitlines()
    assert "width 16, 4 devices (simulated" in table[0]
    head = next(n for n, line in enumerate(table) if line.startswith("loss"))
    rows = [line.split()[:3] for line in table[head + 1 :]]
    assert rows == [[n, b, f] for n in ("sigmoid", "softmax") for b in ("64", "128") for f in ("streamed", "dense")]
    assert said.err == ""
    result = json.loads(out.read_text())
    assert (result["devices"], result["width"], result["travel"], result["topology"]) == (4, 16, "ring", None)
    assert [len(x["seconds"]) for x in result["figures"]] == [2] * 8
    assert [x["flops"] for x in result["figures"] if x["form"] == "dense"] == [6] * 4
    assert "collective-permute" in result["figures"][0]["collectives"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch", 62], "--batch = 62: must be a multiple of the number of devices, 4"),
        (["--batch", 64, 1], "--batch = 1: one pair"),
        (["--batch", "many"], "invalid positive value: 'many'"),
        (["--devices", 99], "--devices = 99: there are 8 of kind cpu"),
        (["--devices", 0], "0 must be positive"),
        (["--loss", "hinge"], "choose from 'softmax', 'sigmoid', 'cuaxu'"),
        (["--travel", "foot"], "choose from 'ring', 'gather', 'auto'"),
        (["--topology", "v5e:4x4"], "not allowed with argument --devices"),
        (["--json", "."], ". is a folder: name a file"),
    ],
)
def test_wrong_use(args, message, capsys):
    assert run(*SMALL, *args) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def test_an_unknown_topology(capsys):
    assert run("--topology", "v5e:3x5") == 2
    assert capsys.readouterr().err.startswith(
        "clipjax: --topology = 'v5e:3x5': there is no such topology; the nearest is v5e:4x4; v5e comes as 1x1, 2x2"
    )
