"""Fine-tuning on emoji: a run that knows names in one language learns those of another, beside one from nothing.

Run:   python benchmarks/finetune.py [--from es] [--to pt] [--start RUN] [--out DIR]
Cost:  about eight minutes on two CPU cores

Both have the same steps, learning rates and tokenizer, that of both languages' names; the fine-tuned one keeps its image tower.
Prints R@1 of the 363 held-out combinations, text to image and image to text, in both languages: of the one from nothing, of the
fine-tuned run, of its start, and along WiSE-FT's curve (2109.01903), averages of the weights before and after.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from clipjax.config import Data
from clipjax.data.sources import open_source
from clipjax.data.tokenizer import Tokenizer

LANGUAGES = {"en": "captions.0", "es": "captions.1", "pt": "captions.4", "it": "captions.5"}  # places in the dataset's list
LENGTH, WORDS = 24, 4000  # tokens of a name; tokens that the tokenizer of both languages knows
CONFIG = """
from dataclasses import replace

from clipjax.config import Cosine, Init, Retrieval, TokenizerFile
from clipjax.config.load import load_config


def config():
    run = load_config("emoji_clip")
    return replace(
        run,
        model=replace(
            run.model,
            text=replace(run.model.text, length={length}, vocab_size={words}),
            image=replace(run.model.image, unlock={unlock}),
        ),
        tokenizer=TokenizerFile(path={tokenizer!r}),
        data=replace(run.data, text_field={field!r}),
        optim=replace(run.optim, schedule=Cosine(warmup=10)),
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
    tokenizer = str((out / "tokenizer.json").resolve())
    (out / f"{name}.py").write_text(CONFIG.format(length=LENGTH, words=WORDS, tokenizer=tokenizer, **values))
    clipjax("train", out / f"{name}.py", "--workdir", out / name)
    return out / name


def train_tokenizer(out: Path, languages: list[str]) -> None:
    """One for the names in these languages, which all runs share."""
    data = [Data(spec="emoji", text_field=LANGUAGES[language]) for language in languages]
    captions = [caption for one in data for caption in open_source(one).captions()]
    Tokenizer.train(captions, WORDS, True, LENGTH).save(out / "tokenizer.json")


def recalls(run: Path, language: str) -> tuple[float, float]:
    """R@1, text to image and image to text."""
    text = clipjax("eval", "retrieval", run, "--data", "emoji", "--text-field", LANGUAGES[language])
    metrics = json.loads(text)["metrics"]
    return metrics["image_retrieval_recall@1"], metrics["text_retrieval_recall@1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="first", choices=list(LANGUAGES), default="es", help="the start's (default: %(default)s)")
    parser.add_argument("--to", dest="second", choices=list(LANGUAGES), default="pt", help="the other (default: %(default)s)")
    parser.add_argument("--start", type=Path, help="the start, if it was trained before")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of fine-tuning, with 256 examples each (default: %(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    common = dict(field=LANGUAGES[args.second], steps=args.steps)
    train_tokenizer(args.out, [args.first, args.second])
    start = args.start or train(args.out, args.first, field=LANGUAGES[args.first], steps=240, init=None, unlock=None)
    name, columns = f"{args.first}-{args.second}", [args.first, args.second]
    tuned = train(args.out, f"{name}-tuned", init=f"Init(run={str(start.resolve())!r})", unlock=0, **common)
    fresh = train(args.out, f"{args.second}-{args.steps}", init=None, unlock=None, **common)
    print(f"{'R@1, text to image / image to text':36}" + "".join(f"{language:>14}" for language in columns))

    def show(what: str, run: Path) -> None:
        found = ["{:.3f}/{:.3f}".format(*recalls(run, language)) for language in columns]
        print(f"{what:36}" + "".join(f"{text:>14}" for text in found), flush=True)

    show(f"{args.steps} steps from nothing", fresh)
    show(f"fine-tuned for {args.steps} steps", tuned)
    show("start: WiSE-FT, alpha = 0", start)
    for alpha in (0.25, 0.5, 0.75):
        average = args.out / f"{name}-{alpha}"
        if not average.exists():
            clipjax("average", start, tuned, "--alpha", alpha, "--out", average)
        show(f"WiSE-FT, alpha = {alpha}", average)


if __name__ == "__main__":
    main()
