"""The results of an evaluation as files: a PNG, and JSON in the format of CLIP_benchmark, so that its scripts can read it."""

import json
import os
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from clipjax.evals.evaluation import Metrics
from clipjax.files import write_atomic


def report(dataset: str, model: str, pretrained: str, task: str, metrics: Metrics, language: str = "en") -> dict[str, Any]:
    """The object that `eval --json` writes. `task` is the name of the evaluation; a metric that is not defined is None."""
    return dict(dataset=dataset, model=model, pretrained=pretrained, task=task, metrics=metrics, language=language)


def write_json(path: str | Path, result: Any) -> None:
    """Writes the complete file or nothing, from the first process. None becomes null; NaN, which JSON lacks, is a ValueError."""
    text = json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    if jax.process_index() == 0:
        with write_atomic(path) as part:
            part.write_text(text, encoding="utf-8")


def save_png(path: str | Path, image: Image.Image) -> None:
    """Writes the complete file or nothing."""
    with write_atomic(path) as part:
        image.save(part, "png")


def png_name(name: str) -> str:
    """`emoji/test-000120` as the name of a PNG. Its last 100 bytes at most: a tsv's name is a path, a file's has 255."""
    return os.fsencode(name.replace(":", "-").replace("/", "-"))[-100:].decode(errors="ignore").lstrip("-") + ".png"
