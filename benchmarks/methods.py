"""The methods of docs/methods on emoji: trains what an experiment compares, and prints its table.

Run:   python benchmarks/methods.py NAME [--seeds 0,1,2] [--files DIR]
       python benchmarks/methods.py --list
Cost:  one to three minutes on two CPU cores for each run

What a run is: benchmarks/method_runs.py. Its metrics.jsonl, with the evaluations at its end, is kept in
benchmarks/results/methods/RUN/SEED; a run whose file is there is not trained again. Of emoji's 363 test pictures one is .003
of a recall, and the plain run's seeds differ by some .03.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import method_data
from method_runs import RUNS
from method_tables import EXPERIMENTS, RESULTS, table

CONFIG = """import sys
from pathlib import Path

sys.path.insert(0, {here!r})
from method_runs import RUNS


def config():
    return RUNS[{name!r}].config(Path({files!r}))
"""


def train(name: str, seed: int, root: Path, workdir: bool = False) -> None:
    """The run `name` of a seed, where its metrics aren't kept already; `workdir`: or where its weights are not there."""
    kept = RESULTS / name / str(seed) / "metrics.jsonl"
    files = (root / str(seed)).resolve()
    if kept.exists() and (not workdir or (files / name).exists()):
        return
    for other in RUNS[name].after:
        train(other, seed, root, workdir=True)
    files.mkdir(parents=True, exist_ok=True)
    method_data.write_bases(files / "bases")
    RUNS[name].prepare(files)
    (files / f"{name}.py").write_text(CONFIG.format(here=str(Path(__file__).parent.resolve()), name=name, files=str(files)))
    words = ["train", files / f"{name}.py", "--workdir", files / name, "--seed", seed]
    subprocess.run([sys.executable, "-m", "clipjax.cli", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    lines = [json.dumps(line) + "\n" for line in RUNS[name].measure(files)]
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(((files / name / "metrics.jsonl").read_text() + "".join(lines)).replace(f"{files}/", ""))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", nargs="?", choices=list(EXPERIMENTS))
    p.add_argument("--list", action="store_true", help="name the experiments, and what each compares")
    p.add_argument("--seeds", default="0", help="with commas between them (default: %(default)s)")
    p.add_argument("--only", help="train this run of the experiment alone")
    p.add_argument("--files", type=Path, default=Path("runs/methods"), help="folder of the workdirs (default: %(default)s)")
    args = p.parse_args()
    if args.list or not args.name:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:20} {experiment.question} ({', '.join(experiment.runs)})")
        return
    for seed in map(int, args.seeds.split(",")):
        for run in [args.only] if args.only else EXPERIMENTS[args.name].runs:
            train(run, seed, args.files)
    print(table(args.name))


if __name__ == "__main__":
    main()
