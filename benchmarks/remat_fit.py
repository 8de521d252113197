"""What `model.remat = "auto"` knows of time on TPUs: compiles steps of every policy and part size, and fits a model to them.

    python benchmarks/remat_fit.py compile FILE [--models siglip_b16] [--depths 2 4] [--pairs 64 128] [--options full:4096 dots]
    python benchmarks/remat_fit.py fit FILE

No TPU is needed. `compile` adds to FILE, a line of JSON each, the steps that FILE lacks. Each takes a minute or more, in a
process of its own (`--under nice`: a command that starts it). Layers are scanned, so that a few take as long to compile as all of
them: `--depths 0` is the model's own depth. `fit` prints the COSTS of train/remat_time.py and their error, what depths 2 and 4
say of the model's own, and for each model, depth and batch how much slower than the fastest the choice is.
benchmarks/results/remat_v5e.jsonl has the steps that the package's costs were fitted to, all of one state of the step.
"""

import argparse
import dataclasses
import functools
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.optimize import lsq_linear

from clipjax import aot, config, plan, sharding
from clipjax.chips import chip_of
from clipjax.config.load import load_config
from clipjax.hlo.cycles import OPTIMIZER
from clipjax.models.runner import CHUNKED_POLICIES
from clipjax.plan.program import state_of
from clipjax.train import remat, remat_time

MODELS, PAIRS, DEPTHS = ("siglip_b16", "siglip_l16", "siglip_so400m"), (64, 128), (2, 4)
IN_PARTS = [f"{policy}:{part}" for policy, part in product(CHUNKED_POLICIES, remat_time.PARTS)]
OPTIONS = ["none", *(o for o in IN_PARTS if o not in ("dots:2048", "dots:8192"))]  # of `dots` one: what it keeps tells most
LEAST = [1, 1, 1, 1, 0, 0]  # of COSTS: no product is faster than the chip's peak, nor what is kept than its memory


@dataclasses.dataclass(frozen=True)
class Point:
    """One step."""

    model: str
    depth: int  # of both towers; 0: the model's own
    pairs: int  # a device
    option: str  # a policy, or policy:part

    @property
    def choice(self) -> remat.Choice:
        policy, _, part = self.option.partition(":")
        return remat.Choice(policy, int(part) if part else None)

    def run(self, devices: int) -> config.Run:
        run = load_config(self.model)
        shape = dataclasses.replace(run.model, remat=self.choice.policy, part=self.choice.part)
        if self.depth:
            image, text = (dataclasses.replace(tower, depth=self.depth) for tower in (shape.image, shape.text))
            shape = dataclasses.replace(shape, image=image, text=text)
        train = dataclasses.replace(run.train, batch_size=devices * self.pairs, micro_batches=1)
        return dataclasses.replace(run, model=shape, train=train, mesh=config.Mesh())


def figures(point: Point, topology: str) -> dict[str, Any]:
    """Compiles a step."""
    devices = aot.tpu_devices(topology)
    try:
        compiled = plan.compile_run(point.run(len(devices)), devices)
    except aot.DoesNotFit as error:
        return {"peak": error.needed}
    assert compiled.cycles is not None
    parts = {part: round(count) for part, count in compiled.cycles.parts.items()}
    seconds = round(compiled.seconds)
    return {"peak": compiled.peak_bytes, "cycles": sum(parts.values()), "parts": parts, "compiled in": seconds}


Line = dict[str, Any]  # of FILE: topology, jax, and `figures`


def read(file: Path) -> dict[Point, Line]:
    """FILE's lines. A later one of the same step counts."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {Point(**line.pop("step")): line for line in lines}


def compile_missing(file: Path, points: Iterable[Point], topology: str, under: list[str]) -> None:
    for point in points:
        if point in read(file):  # again each time: several may write to it
            continue
        step = dataclasses.asdict(point)
        command = [*under, sys.executable, __file__, "one", json.dumps(step), "--topology", topology]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"{point}: failed", file=sys.stderr, flush=True)
            continue
        line = {"step": step, "topology": topology, "jax": jax.__version__, **json.loads(done.stdout.splitlines()[-1])}
        with file.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        print(point, line.get("cycles"), line["peak"], flush=True)


@functools.cache
def context(topology: str) -> tuple[Any, Any]:
    devices = aot.tpu_devices(topology)
    return sharding.make_mesh(config.Mesh(), devices), chip_of(devices[0].device_kind)


def terms(point: Point, topology: str) -> np.ndarray:
    """Those of a step's towers together."""
    mesh, chip = context(topology)
    run = point.run(mesh.size)
    layout = remat.layout_of(run, mesh)
    works = remat.work(run, mesh, point.choice.policy, point.choice.part)
    return np.sum([remat_time.terms(work, point.choice.policy, layout, chip) for work in works], axis=0)


def fit(known: dict[Point, Line]) -> None:
    """The costs, with a constant for the rest of each model and depth, by pairs: the choice is between steps that have it in
    common. The optimizer is left out, as it does not grow with them.
    """
    points = [point for point, line in known.items() if "cycles" in line]
    cycles = np.array([known[p]["cycles"] for p in points])
    optimizer = np.array([known[p]["parts"][OPTIMIZER] for p in points])
    clocks = np.array([context(known[p]["topology"])[1].clock for p in points])
    models = sorted({(p.model, p.depth) for p in points})
    rest = 1e6 * np.array([[p.pairs * ((p.model, p.depth) == model) for model in models] for p in points])
    rows = np.hstack([np.array([terms(p, known[p]["topology"]) for p in points]) * clocks[:, None], rest])
    least = np.array(LEAST + [0] * len(models))
    found = lsq_linear(rows / cycles[:, None], 1 - optimizer / cycles, (least, np.inf)).x  # the least relative error
    errors = (rows @ found + optimizer) / cycles - 1
    print(f"COSTS = Terms({', '.join(f'{cost:.2f}' for cost in found[: -len(models)])})")
    print(f"error of a step: {np.sqrt(np.mean(errors**2)):.1%} (root of the mean square), at most {np.abs(errors).max():.1%}")
    for p, count, error in zip(points, cycles, errors, strict=True):
        print(f"  {p.model:<14} depth {p.depth:>2}, {p.pairs:>4} pairs, {p.option:<10} {count / 1e6:8.1f} Mcycles {error:+6.1%}")


def extrapolate(known: dict[Point, Line]) -> None:
    """Where all three are known: what the steps of depths 2 and 4 say of the one of the model's own depth."""
    for point, line in known.items():
        few = [known.get(dataclasses.replace(point, depth=depth), {}).get("cycles") for depth in DEPTHS]
        if point.depth == 0 and "cycles" in line and all(few):
            depth = load_config(point.model).model.image.depth
            said = few[0] + (few[1] - few[0]) / (DEPTHS[1] - DEPTHS[0]) * (depth - DEPTHS[0])
            found = f"{line['cycles'] / 1e6:.1f} Mcycles, {said / line['cycles'] - 1:+.1%} from depths 2 and 4"
            print(f"  {point.model}, {point.pairs} pairs, {point.option}: {found}")


def memory(known: dict[Point, Line]) -> None:
    """The estimate of memory beside what was compiled."""
    ratios = {}
    for point, line in known.items():
        if line["peak"]:
            mesh, _ = context(line["topology"])
            run = point.run(mesh.size)
            needed = remat.needed(run, mesh, state_of(run, mesh), point.choice.policy, point.choice.part)
            ratios[point] = needed / line["peak"]
    for policy in remat.POLICIES_BY_MEMORY:
        if found := [ratio for point, ratio in ratios.items() if point.choice.policy == policy]:
            print(f"  {policy:<5} {min(found):.2f} to {max(found):.2f} times what {len(found)} steps were compiled to")


def judge(known: dict[Point, Line]) -> None:
    """How much slower than the fastest step that compiled the choice is."""
    places = {(p.model, p.depth, p.pairs, line["topology"]) for p, line in known.items()}
    for model, depth, pairs, topology in sorted(places):
        here = {p.choice: line for p, line in known.items() if (p.model, p.depth, p.pairs) == (model, depth, pairs)}
        cycles = {choice: line["cycles"] for choice, line in here.items() if "cycles" in line}
        mesh, _ = context(topology)
        run = Point(model, depth, pairs, "auto").run(mesh.size)
        chosen = dataclasses.replace(remat.choice(run, mesh, state_of(run, mesh)), reason=None)
        best = min(cycles, key=lambda choice: cycles[choice])
        ratio = f"{cycles[chosen] / cycles[best] - 1:+.1%}" if chosen in cycles else "not compiled"
        fastest = f"fastest of {len(cycles)}: {best} with {cycles[best] / 1e6:.1f} Mcycles"
        print(f"  {model}, depth {depth}, {pairs} pairs: {chosen} {ratio}; {fastest}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["compile", "fit", "one"])
    parser.add_argument("file", help="of JSON lines; with `one`, which prints a line: the step")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS)
    parser.add_argument("--pairs", nargs="+", type=int, default=PAIRS, help="a device")
    parser.add_argument("--options", nargs="+", default=OPTIONS)
    parser.add_argument("--under", default="", help="a command that starts each compilation")
    args = parser.parse_args()
    if args.command == "one":
        print(json.dumps(figures(Point(**json.loads(args.file)), args.topology)))
    elif args.command == "compile":
        steps = product(args.models, args.depths, args.pairs, args.options)
        compile_missing(Path(args.file), [Point(*step) for step in steps], args.topology, shlex.split(args.under))
    else:
        known = read(Path(args.file))
        fit(known)
        print("the model's own depth")
        extrapolate(known)
        print("the estimate of memory")
        memory(known)
        print("the choice")
        judge(known)


if __name__ == "__main__":
    main()
