"""The methods of docs/methods on emoji: trains what an experiment compares, and prints its table.

Run:   python benchmarks/methods.py NAME [--seeds 0,1,2] [--runs DIR]
       python benchmarks/methods.py --list
Cost:  three to ten minutes on two CPU cores for each run, which has 240 steps of 256 examples

What a run is: benchmarks/method_runs.py. Its metrics.jsonl, with the evaluations at its end, is kept in
benchmarks/results/methods/RUN/SEED; a run whose file is there is not trained again. Of emoji's 363 test pictures one is .003
of a recall, and the plain run's seeds differ by some .03.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from method_runs import EXPERIMENTS, RUNS, Figure

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "methods"
CONFIG = """import sys

sys.path.insert(0, {here!r})
from method_runs import RUNS


def config():
    return RUNS[{name!r}].config({folder!r})
"""


def clipjax(*words: object) -> None:
    done = subprocess.run([sys.executable, "-m", "clipjax.cli", *map(str, words)], check=False, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"clipjax {' '.join(map(str, words))} failed, status {done.returncode}")


def train(name: str, seed: int, runs: Path) -> None:
    """The run `name` of a seed, where its metrics aren't kept already."""
    kept = RESULTS / name / str(seed) / "metrics.jsonl"
    if kept.exists():
        return
    workdir = runs / name / str(seed)
    workdir.mkdir(parents=True, exist_ok=True)
    for needed in RUNS[name].after:
        train(needed, seed, runs)
    RUNS[name].prepare(runs, seed)
    file = runs / name / f"{seed}.py"
    file.write_text(CONFIG.format(here=str(HERE.resolve()), name=name, folder=str((runs / name / str(seed)).resolve())))
    clipjax("train", file, "--workdir", workdir, "--seed", seed)
    for line in RUNS[name].measure(workdir):
        with (workdir / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps(line) + "\n")
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(workdir / "metrics.jsonl", kept)


def found(figure: Figure, name: str, seed: int) -> float | None:
    """A figure of the end of a run; None where it has none."""
    value = None
    for line in (RESULTS / name / str(seed) / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if figure.task is None:
            value = entry.get(figure.metric, value)
        elif entry.get("task") == figure.task and figure.dataset in (None, entry["dataset"]):
            value = entry["metrics"].get(figure.metric, value)
    return value


def table(name: str) -> str:
    """Markdown: a row a figure, a column a run, and in a cell all seeds that are there."""
    experiment = EXPERIMENTS[name]
    seeds = {run: sorted(int(path.name) for path in (RESULTS / run).glob("*")) for run in experiment.runs}
    rows = ["| | " + " | ".join(RUNS[run].title for run in experiment.runs) + " |", "| --- " * (len(seeds) + 1) + "|"]
    for figure in experiment.figures:
        values = [[found(figure, run, seed) for seed in seeds[run]] for run in experiment.runs]
        cells = [", ".join("–" if value is None else f"{value:{figure.form}}" for value in one) for one in values]
        rows.append(f"| {figure.title} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", nargs="?", choices=list(EXPERIMENTS))
    p.add_argument("--list", action="store_true", help="name the experiments, and what each compares")
    p.add_argument("--seeds", default="0", help="with commas between them (default: %(default)s)")
    p.add_argument("--runs", type=Path, default=Path("runs/methods"), help="folder of the workdirs (default: %(default)s)")
    p.add_argument("--only", help="train this run of the experiment alone")
    args = p.parse_args()
    if args.list or not args.name:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:20} {experiment.question} ({', '.join(experiment.runs)})")
        return
    for seed in map(int, args.seeds.split(",")):
        for run in [args.only] if args.only else EXPERIMENTS[args.name].runs:
            train(run, seed, args.runs)
    print(table(args.name))


if __name__ == "__main__":
    main()
