"""What libraries learn from the environment alone, and before they are loaded."""

from glob import glob
from pathlib import Path

# glibc then asks for huge pages. Without them XLA's buffers on a CPU, made anew each step, cost 380,000 page faults a step of
# benchmarks/step.py and a quarter of its time.
MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

# For libtpu on a machine without a TPU, where it only compiles: it neither asks Google's network about the machine, nor refuses
# to be loaded by two programs, nor complains of being nowhere.
COMPILE_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
GOOGLE = "0x1ae0"  # vendor of TPUs, as PCI tells it


def wanted() -> dict[str, str]:
    """What this machine's programs shall find in their environment, unless it says otherwise already."""
    vendors = (Path(path).read_text().strip() for path in glob("/sys/bus/pci/devices/*/vendor"))
    return MALLOC if GOOGLE in vendors else MALLOC | COMPILE_ONLY
