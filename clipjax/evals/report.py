"""The result of an evaluation as CLIP_benchmark writes it, so that its tables and scripts read ours."""

import json
from pathlib import Path
from typing import Any

import jax

from clipjax.evals.encoder import Metrics
from clipjax.files import write_whole


def report(dataset: str, model: str, pretrained: str, task: str, metrics: Metrics, language: str = "en") -> dict[str, Any]:
    """What `eval --json` holds; `task` is the evaluation's, a metric that does not exist is None."""
    return dict(dataset=dataset, model=model, pretrained=pretrained, task=task, metrics=metrics, language=language)


def write_json(path: str | Path, result: Any) -> None:
    """Writes whole or not at all, from the first process. None is null; NaN, which JSON lacks, is a ValueError."""
    text = json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    if jax.process_index() == 0:
        with write_whole(path) as part:
            part.write_text(text, encoding="utf-8")
