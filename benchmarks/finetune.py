"""Fine-tuning on emoji: a run that knows English names learns those of another language, beside a run that starts from nothing.

Run:   python benchmarks/finetune.py [--start RUN] [--out DIR]
Cost:  about ten minutes on two CPU cores

Prints R@1 of the 363 held-out combinations, text to image and image to text, for the run before, the fine-tuned one, one of
as many steps from nothing, and WiSE-FT's curve (2109.01903): the average of the weights before and after, in both languages.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

LANGUAGES = {"en": "captions.0", "es": "captions.1", "pt": "captions.4", "fr": "captions.6"}  # places in the dataset's list
LENGTH = 48  # tokens: a tokenizer of English names needs up to 44 for others
CONFIG = """
from dataclasses import replace

from clipjax.config import Cosine, Init, Retrieval
from clipjax.config.load import load_config


def config():
    run = load_config("emoji_clip")
    return replace(
        run,
        model=replace(run.model, text=replace(run.model.text, length={length})),
        data=replace(run.data, text_field={field!r}),
        optim=replace(run.optim, lr={lr}, schedule=Cosine(warmup=10)),
        train=replace(run.train, steps={steps}, checkpoint_every={steps}),
        evals=(Retrieval(every={steps}, text_field={field!r}),),
        init={init},
    )
"""


def clipjax(*words: object) -> str:
    done = subprocess.run([sys.executable, "-m", "clipjax.cli", *map(str, words)], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def train(out: Path, name: str, **values: object) -> Path:
    """A finished run of CONFIG with these values."""
    (out / f"{name}.py").write_text(CONFIG.format(length=LENGTH, **values))
    clipjax("train", out / f"{name}.py", "--workdir", out / name)
    return out / name


def recalls(run: Path, language: str) -> tuple[float, float]:
    """R@1, text to image and image to text."""
    text = clipjax("eval", "retrieval", run, "--data", "emoji", "--text-field", LANGUAGES[language])
    metrics = json.loads(text)["metrics"]
    return metrics["image_retrieval_recall@1"], metrics["text_retrieval_recall@1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, help=f"a finished run of emoji_clip with model.text.length = {LENGTH}")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--language", choices=list(LANGUAGES)[1:], default="pt", help="the other language (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of 256 examples (default: %(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start, other = args.start or args.out / "start", args.language
    if args.start is None:
        clipjax("train", "emoji_clip", "--workdir", start, "--model.text.length", LENGTH)
    common = dict(field=LANGUAGES[other], steps=args.steps)
    tuned = train(args.out, f"{other}-tuned", lr=5e-4, init=f"Init(run={str(start.resolve())!r})", **common)
    fresh = train(args.out, f"{other}-fresh", lr=1e-3, init=None, **common)
    columns = ["en", other]
    print(f"{'R@1, text to image / image to text':36}" + "".join(f"{language:>14}" for language in columns))

    def show(name: str, run: Path) -> None:
        found = ["{:.3f}/{:.3f}".format(*recalls(run, language)) for language in columns]
        print(f"{name:36}" + "".join(f"{text:>14}" for text in found), flush=True)

    show(f"{args.steps} steps from nothing", fresh)
    show("before", start)
    for alpha in (0.25, 0.5, 0.75):
        average = args.out / f"{other}-{alpha}"
        if not average.exists():
            clipjax("average", start, tuned, "--alpha", alpha, "--out", average)
        show(f"WiSE-FT, alpha = {alpha}", average)
    show(f"fine-tuned for {args.steps} steps", tuned)


if __name__ == "__main__":
    main()
