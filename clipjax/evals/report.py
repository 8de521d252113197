"""The result of an evaluation as CLIP_benchmark writes it, so that its tables and scripts read ours."""

import json
import os
from pathlib import Path
from typing import Any

from clipjax.evals.embed import Metrics


def report(dataset: str, model: str, pretrained: str, task: str, metrics: Metrics, language: str = "en") -> dict[str, Any]:
    """`{"dataset", "model", "pretrained", "task", "metrics", "language"}`; `task` as in `Zeroshot.task`, `Retrieval.task`."""
    return dict(dataset=dataset, model=model, pretrained=pretrained, task=task, metrics=metrics, language=language)


def write_json(path: str | Path, result: dict[str, Any]) -> None:
    """Writes whole or not at all. A metric that does not exist is null; NaN, which JSON lacks, is a ValueError."""
    path = Path(path)
    text = json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
