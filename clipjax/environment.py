"""Settings of libraries that depend on the machine and on environment variables: memory, libtpu, JAX's compiled programs."""

import logging
import os
from collections.abc import Mapping
from glob import glob
from pathlib import Path
from typing import NoReturn

from clipjax.config import require

# glibc then uses huge pages. Without them, XLA's CPU buffers, which are allocated again in each step, cost 380,000 page faults in
# a step of benchmarks/step.py, and a quarter of its time.
MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

# For libtpu on a machine without a TPU, where it only compiles: it does not ask Google's network about the machine, may be loaded
# by two programs, and does not warn that there is no TPU.
COMPILE_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
# For JAX's plugin for CUDA on a machine without such a GPU, where it only compiles: it needs none of CUDA's libraries.
NO_CUDA = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
GOOGLE = "0x1ae0"  # the PCI vendor of TPUs


def wanted() -> dict[str, str]:
    """Environment variables to set for programs on this machine, unless they are set already."""
    return MALLOC | _compile_only()


def quiet() -> None:
    """For a program that is not clipjax's own: keeps the compilers for chips that this machine lacks from printing warnings.

    Does nothing where they are loaded already.
    """
    os.environ |= _compile_only() | os.environ


def _compile_only() -> dict[str, str]:
    return ({} if _has_tpu() else COMPILE_ONLY) | ({} if _has_nvidia() else NO_CUDA)


def leave_out_libtpu() -> None:
    """Where this machine has no TPU: keeps JAX from loading libtpu, which may be installed for `clipjax plan`. Of another version
    than JAX, it ends the process when a profile begins. Call it before anything asks JAX for devices.
    """
    from jax.extend import backend  # here: `clipjax --help` stays instant

    def refuse() -> NoReturn:
        raise RuntimeError("this machine has no TPU")

    if not _has_tpu():
        backend.register_backend_factory("tpu", refuse)


def program_cache(environ: Mapping[str, str], platform: str) -> Path | None:
    """Where JAX is to keep compiled programs, so that a run that is started again need not compile. None: nowhere, or where JAX's
    own variable says.

    `platform`: that of `jax.default_backend()`. Never on CPUs: there XLA loses the order of collectives in a program that it
    loads, and devices then wait for each other. Raises ConfigError where CLIPJAX_CACHE is set, and not to off.
    """
    wanted = environ.get("CLIPJAX_CACHE", "")
    require(wanted in ("", "off"), "CLIPJAX_CACHE", wanted, "must be off, or not set")
    if platform not in ("tpu", "gpu") or wanted or environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    folder = Path(environ.get("XDG_CACHE_HOME", ""))  # the specification has relative paths ignored
    return (folder if folder.is_absolute() else Path(os.path.expanduser("~")) / ".cache") / "clipjax" / "jax"


def keep_programs() -> None:
    """Makes JAX keep compiled programs in `program_cache`. A folder that can't be written to costs a warning. Call it once the
    processes of a run are joined: it asks for the devices.
    """
    import jax  # here: `clipjax --help` stays instant

    folder = program_cache(os.environ, jax.default_backend())
    told = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]: JAX adds it when it is imported
    if folder is None or told is not None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("may not be written to")
    except OSError as error:
        logging.warning(f"{folder}: compiled programs are not kept: {error.strerror or error}; CLIPJAX_CACHE=off is silent")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _has_tpu() -> bool:
    return GOOGLE in (Path(path).read_text().strip() for path in glob("/sys/bus/pci/devices/*/vendor"))


def _has_nvidia() -> bool:
    return any(Path(path).exists() for path in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg"))  # as JAX asks
