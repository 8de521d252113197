"""Several real processes of one program, which JAX joins: what several hosts do, on this machine."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import QUICK, SIMPLEST

ROOT = Path(__file__).parents[1]
CLI = ("-c", "import sys; from clipjax import cli; sys.exit(cli.main())")  # what `clipjax` runs, in this Python

# The settings of conftest.py. Nothing from a cache: XLA's CPU client can hang on a program of several devices that it loads.
STRICT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "JAX_ENABLE_COMPILATION_CACHE": "0",
    "PYTHONPATH": str(ROOT),
} | ({"XLA_FLAGS": SIMPLEST} if QUICK else {})


@dataclass
class Host:
    """One of the processes. Its output goes to files, so that none waits for a reader."""

    process: subprocess.Popen
    out: Path
    err: Path

    @property
    def said(self) -> str:
        return self.out.read_text()

    @property
    def complained(self) -> str:
        return self.err.read_text()

    @property
    def status(self) -> int | None:
        """As subprocess tells it: negative for a signal; None while it runs."""
        return self.process.poll()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def started(n: int, program: Sequence[str], folder: Path, devices: int = 1, cwd: Path = ROOT, **env: str) -> Iterator[list[Host]]:
    """`n` processes of `python *program`, each with `devices` simulated devices; killed when the block is left.

    `env` is added to each environment. With `n` = 1 there is nothing to join.
    """
    folder.mkdir(parents=True, exist_ok=True)
    address = f"localhost:{free_port()}"
    hosts = []
    try:
        for i in range(n):
            own = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(n), "JAX_PROCESS_ID": str(i)} if n > 1 else {}
            own |= {"JAX_NUM_CPU_DEVICES": str(devices)}
            out, err = folder / f"{i}.out", folder / f"{i}.err"
            with out.open("w") as o, err.open("w") as e:
                command = [sys.executable, *program]
                process = subprocess.Popen(command, env=os.environ | STRICT | own | env, stdout=o, stderr=e, cwd=cwd)
            hosts.append(Host(process, out, err))
        yield hosts
    finally:
        for host in hosts:
            if host.status is None:
                host.signal(signal.SIGKILL)
        for host in hosts:
            host.process.wait()


def ended(hosts: Sequence[Host], seconds: float = 900) -> list[int]:
    """Their statuses once all have ended. Fails with what they said where that takes too long."""
    limit = time.monotonic() + seconds
    while any(host.status is None for host in hosts):
        assert time.monotonic() < limit, f"still running after {seconds} s: {report(hosts)}"
        time.sleep(0.05)
    return [host.status for host in hosts]


def until(hosts: Sequence[Host], path: Path, text: str, seconds: float = 900) -> None:
    """Waits until a file holds a text. Fails at once where a process ends badly before."""
    limit = time.monotonic() + seconds
    while not path.exists() or text not in path.read_text():
        assert not any(host.status for host in hosts), report(hosts)
        assert time.monotonic() < limit, f"no {text!r} in {path.name} after {seconds} s: {report(hosts)}"
        time.sleep(0.02)


def report(hosts: Sequence[Host]) -> str:
    """What each said last, for a person to read."""
    parts = (f"{host.err.stem}: status {host.status}\n{host.said[-2000:]}\n{host.complained[-4000:]}" for host in hosts)
    return "\n".join(["", *parts])


def run(n: int, program: Sequence[str], folder: Path, devices: int = 1, seconds: float = 900, **env: str) -> list[Host]:
    """As `started`, to the end, which must be a good one."""
    with started(n, program, folder, devices, **env) as hosts:
        assert ended(hosts, seconds) == [0] * n, report(hosts)
        return hosts


def metrics(workdir: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> dict[int, float]:
    """Step -> loss, of a run whose lines are each of another step."""
    lines = [line for line in metrics(workdir) if "loss" in line]
    found = {line["step"]: line["loss"] for line in lines}
    assert len(found) == len(lines), "a step is there twice"
    return found
