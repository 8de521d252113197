"""Settings that libraries read from the environment only, and before they are loaded."""

import os
from glob import glob
from pathlib import Path

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
GOOGLE = "0x1ae0"  # the PCI vendor of TPUs


def wanted() -> dict[str, str]:
    """Environment variables to set for programs on this machine, unless they are set already."""
    return MALLOC if _has_tpu() else MALLOC | COMPILE_ONLY


def quiet() -> None:
    """For a program that is not clipjax's own: keeps libtpu, where it is installed and there is no TPU, from printing warnings.

    Does nothing where it is loaded already.
    """
    if not _has_tpu():
        os.environ |= COMPILE_ONLY | os.environ


def _has_tpu() -> bool:
    return GOOGLE in (Path(path).read_text().strip() for path in glob("/sys/bus/pci/devices/*/vendor"))
