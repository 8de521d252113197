"""Compiling for GPUs that this machine does not have.

Tests that need the compiler, the extra `gpu-plan`, are skipped where it is not installed. test_hlo.py reads what it wrote once.
"""

import dataclasses
import json
import math
import re
from importlib import metadata

import jax
import pytest

from clipjax import aot, cli, config, gpus, plan
from clipjax.chips import chip_of
from clipjax.config import ConfigError
from clipjax.config.load import load_config
from clipjax.plan.program import state_of
from tests import gpu_program
from tests.train import tiny_emoji

CONFIG = tiny_emoji.__file__


@pytest.fixture
def compiler():
    pytest.importorskip("jax_plugins.xla_cuda13", reason="the GPU compiler: pip install 'clipjax[gpu-plan]'")


def test_every_kind_has_a_chip():
    assert {chip_of(gpu.device_kind).capacity for gpu in gpus.GPUS.values()} == {80e9, 141e9, 180e9}
    for kind, gpu in gpus.GPUS.items():
        assert f'device_description_str: "{gpu.device_kind}"' in gpus.description(kind)
        units = {8: 2048, 9: 4096, 10: 8192}[gpu.capability]  # bfloat16 FLOPs of a multiprocessor in a cycle
        assert gpu.cores * units * gpu.clock * 1e9 == pytest.approx(chip_of(gpu.device_kind).flops, rel=0.01)


@pytest.mark.parametrize("topology", ["h100", "H100:8", "h100:9", "h100:0", "h100:2x16", "h100x8", "b200:2x8x8", "a100:"])
def test_a_topology_that_is_none(topology, capsys):
    assert cli.main(["plan", CONFIG, "--topology", topology]) == 2
    said = f"--topology = {topology!r}: name GPUs as h100:8, or as h100:2x8 on two hosts, with at most 8 each; the kinds are a100"
    assert said in capsys.readouterr().err


def test_gpus_have_no_slices(capsys):
    assert cli.main(["plan", CONFIG, "--topology", "h100:8", "--slices", "2"]) == 2
    assert "--slices = 2: only TPUs have several slices: name GPUs' hosts, as h100:2x8" in capsys.readouterr().err


@pytest.mark.parametrize("missing", gpus.COMPILER)
def test_without_the_compiler_the_message_names_the_extra(missing, monkeypatch):
    def version(name):
        if name == missing:
            raise metadata.PackageNotFoundError(name)
        return jax.__version__

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ConfigError, match=rf"h100:8'.*compiler, {missing}: pip install 'clipjax\[gpu-plan\]' \(Linux only\)$"):
        gpus.gpu_devices("h100:8")


def test_a_compiler_of_another_jax_is_refused(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.9.1")
    with pytest.raises(ConfigError, match=rf"jax-cuda13-pjrt, is of version 0.9.1, and JAX of {jax.__version__}: pip install"):
        gpus.gpu_devices("h100:8")


def test_what_the_tiles_of_a_release_do_not_fit_goes_to_a_library():
    class Untiled:
        def compile(self, options):
            raise jax.errors.JaxRuntimeError(f"INTERNAL: {options or aot.UNTILED}")

    with pytest.raises(aot.CompilerError, match=r"INTERNAL: {'xla_gpu_enable_triton_gemm': False}"):
        aot.compile(Untiled())


# With the compiler


@pytest.mark.parametrize("kind", gpus.GPUS)
def test_the_saved_program_is_what_it_writes(kind, compiler):
    found = gpu_program.compiled(kind).cost
    assert found.flops == gpu_program.PRODUCTS
    assert found.collectives["all-reduce"].bytes == gpu_program.SUMMED


def test_hosts_are_joined_as_slices_are(compiler):
    devices = gpus.gpu_devices("a100:2x4")
    assert [device.process_index for device in devices] == [0] * 4 + [1] * 4
    mesh = plan.make_target(load_config(CONFIG), "a100:2x4").mesh
    assert dict(mesh.shape) == dict(slice=2, data=4, fsdp=1, tensor=1)
    assert [{d.process_index for d in half.flat} for half in mesh.devices] == [{0}, {1}]
    flat = dataclasses.replace(load_config(CONFIG), mesh=config.Mesh(data=1, fsdp=8))  # across hosts, as on real ones
    assert plan.make_target(flat, "a100:2x4").mesh.shape["slice"] == 1


def directly(run, topology):
    """The peak of the run's step and the bytes of its all-reduces, none of which is in a loop, on one device; by JAX alone."""
    target = plan.make_target(run, topology)
    lowered = plan.lower_step(run, target.mesh, state_of(run, target.mesh))
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError:
        program = lowered.compile({"xla_gpu_enable_triton_gemm": False})
    reduced = re.findall(r" = (.*) all-reduce-start\(", program.as_text())
    sizes = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}
    arrays = [array for shapes in reduced for array in re.findall(r"(\w+)\[([\d,]*)\]", shapes)]
    counted = sum(sizes[kind] * math.prod(int(n) for n in axes.split(",") if n) for kind, axes in arrays)
    return program.memory_analysis().peak_memory_in_bytes, counted


RECIPE = pytest.param("clip_b16", "h100:8", marks=pytest.mark.recipes)


@pytest.mark.parametrize(("name", "topology"), [pytest.param(CONFIG, "h100:2x4", marks=pytest.mark.slow), RECIPE])
def test_a_plan_is_of_the_same_program_as_a_direct_compile(name, topology, compiler, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert cli.main(["plan", name, "--topology", topology, "--json", str(out)]) == 0
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    summed = found["collectives"].get("all-reduce", {"bytes": 0})["bytes"]
    assert (found["peak_bytes_per_chip"], summed) == directly(load_config(name), topology)
    assert found["fits"]
    assert found["capacity_bytes"] == 0.75 * chip_of(found["device_kind"]).capacity
    assert found["estimate"]["bound"] == "memory"
    assert ("hosts" in " ".join(found["estimate"]["lacks"])) == ("x" in topology)
    assert ("  leaves out the buffers of NCCL" in said) == (found["chips"] > 1)
    assert "  leaves out the workspace of cuDNN" in said
