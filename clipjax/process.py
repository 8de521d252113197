"""What tells this machine from others, and which of its processes are alive."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path


def machine() -> str:
    """What tells this machine since its start, and this container on it, from others of the same name; '' if nothing does."""
    with contextlib.suppress(OSError):
        if sys.platform == "linux":
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            return f"{boot} {os.readlink('/proc/self/ns/pid')}"
        return subprocess.run(["sysctl", "-n", "kern.bootsessionuuid"], capture_output=True, text=True).stdout.strip()
    return ""


def birth(pid: int) -> str | None:
    """When a process of this machine began; None if there is no such process, '' if the system does not say."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:  # another user's process
        pass
    with contextlib.suppress(OSError):
        if sys.platform == "linux":  # in ticks since the machine's start; the name before may hold spaces and brackets
            state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return None if state in "ZX" else numbers[18]
        command = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
        environment = os.environ | {"LC_ALL": "C", "TZ": "UTC"}
        state, _, began = subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip().partition(" ")
        return None if not state or state.startswith("Z") else " ".join(began.split())
    return ""
