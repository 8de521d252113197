"""Where JAX keeps compiled programs: asked of a pure function, for platforms that this machine lacks; then of a program."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from clipjax import environment
from clipjax.config import ConfigError
from clipjax.environment import program_cache

HOME = Path(os.path.expanduser("~"))


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({}, HOME / ".cache/clipjax/jax"),
        ({"XDG_CACHE_HOME": "/scratch/cache"}, Path("/scratch/cache/clipjax/jax")),
        ({"XDG_CACHE_HOME": "cache"}, HOME / ".cache/clipjax/jax"),
        ({"JAX_COMPILATION_CACHE_DIR": "gs://bucket/jax"}, None),
        ({"CLIPJAX_CACHE": "off"}, None),
        ({"CLIPJAX_CACHE": "off", "XDG_CACHE_HOME": "/scratch"}, None),
    ],
)
def test_accelerators_keep_their_programs_unless_told_otherwise(environ, folder, platform):
    assert program_cache(environ, platform) == folder


@pytest.mark.parametrize("environ", [{}, {"XDG_CACHE_HOME": "/scratch"}, {"CLIPJAX_CACHE": "off"}])
def test_cpus_never_do(environ):
    assert program_cache(environ, "cpu") is None


def test_a_typing_error_is_refused():
    with pytest.raises(ConfigError, match=r"^CLIPJAX_CACHE = 'Off': must be off, or not set$"):
        program_cache({"CLIPJAX_CACHE": "Off"}, "cpu")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """JAX says that it has a GPU, and that no folder is set."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def test_jax_is_told(gpu, caplog):
    environment.keep_programs()
    assert jax.config.jax_compilation_cache_dir == str(gpu / "clipjax" / "jax")
    assert (gpu / "clipjax" / "jax").is_dir()
    assert not caplog.records


def test_what_jax_was_told_before_stays(gpu, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    environment.keep_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")


def test_a_folder_that_can_not_be_written_to_costs_a_warning(gpu, caplog):
    (gpu / "clipjax").write_text("a file")
    with caplog.at_level(logging.WARNING):
        environment.keep_programs()
    assert jax.config.jax_compilation_cache_dir is None
    (record,) = caplog.records
    assert (
        record.getMessage() == f"{gpu}/clipjax/jax: compiled programs are not kept: Not a directory; CLIPJAX_CACHE=off is silent"
    )


def test_a_program_on_cpus_keeps_nothing(tmp_path):
    code = "import jax; from clipjax import environment; environment.keep_programs(); print(jax.config.jax_compilation_cache_dir)"
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert (done.stdout, list(tmp_path.iterdir())) == ("None\n", []), done.stderr
