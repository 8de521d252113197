"""The effect of TPU compiler options on a compiled train step, without a TPU.

    python benchmarks/tpu_flags.py configs/siglip_b16.py --topology v5e:16x16 [--options "--xla_enable_async_all_gather=true"]

The step is compiled with libtpu's defaults and with the options (default: those of launch/tpu_flags.sh). libtpu reads
LIBTPU_INIT_ARGS once, so each compilation has a process of its own. "Started" collectives are started and awaited in two
instructions; "overlapped" are those of them with a product in between.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from clipjax import aot, plan
from clipjax.config.load import load_config
from clipjax.plan.estimate import estimate

FLAGS = Path(__file__).parents[1] / "launch" / "tpu_flags.sh"


def figures(config: str, topology: str) -> dict[str, str]:
    """Of the step, by the compiler of this process."""
    run, devices = load_config(config), aot.tpu_devices(topology)
    compiled = plan.compile_run(run, devices)
    cost = compiled.cost
    found = estimate(cost, devices, run.train.batch_size, 0.0, compiled.cycles)
    return {
        "peak, GiB a chip": f"{compiled.peak_bytes / 2**30:.2f}",
        "collectives, MB": f"{sum(c.bytes for c in cost.collectives.values()) / 1e6:,.0f}",
        "started": str(cost.started),
        "overlapped": str(cost.overlapped),
        "memory traffic, GB": f"{cost.memory_bytes / 1e9:.1f}",
        "bound, s": f"{found.step_seconds:.3f}",
        "by the compiler, s": f"{found.compiler.seconds:.3f}" if found.compiler and found.compiler.seconds else "unknown",
        "compiled in, s": f"{compiled.seconds:.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a file of configs/")
    parser.add_argument("--topology", required=True, help="as v5e:16x16")
    parser.add_argument("--options", help="the value of LIBTPU_INIT_ARGS (default: those of launch/tpu_flags.sh)")
    parser.add_argument("--one", action="store_true", help="compile in this process, with its LIBTPU_INIT_ARGS, and print JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(figures(args.config, args.topology)))
        return
    environment = os.environ | {"LIBTPU_INIT_ARGS": ""}
    options = args.options
    if options is None:
        options = subprocess.run([FLAGS], env=environment, capture_output=True, text=True, check=True).stdout.strip()
    command = [sys.executable, __file__, args.config, "--topology", args.topology, "--one"]
    found = []
    for given in ("", options):
        done = subprocess.run(
            command, env=environment | {"LIBTPU_INIT_ARGS": given}, stdout=subprocess.PIPE, text=True, check=True
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{args.config}, {args.topology}; defaults, and with {options}")
    for name, plain in found[0].items():
        print(f"  {name:<20} {plain:>10} {found[1][name]:>10}")


if __name__ == "__main__":
    main()
