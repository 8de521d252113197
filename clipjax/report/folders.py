"""What lies in the workdirs that a report is of. Files alone: no checkpoint is read."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipjax import config
from clipjax.config import require
from clipjax.files import as_path, resolve

Line = dict[str, Any]


@dataclass(frozen=True)
class Folder:
    """A workdir's files."""

    path: Path
    name: str  # short, and different from those of the other folders
    config: dict[str, Any]
    training: list[Line]  # of metrics.jsonl, in order of the steps
    evaluations: list[Line]

    @property
    def batch(self) -> int:
        return self.config["train"]["batch_size"]

    @property
    def trained_on(self) -> str:
        data = self.config["data"]
        return ", ".join(part["spec"] for part in data["sources"]) or data["spec"]

    @property
    def steps(self) -> int:
        return max((line["step"] for line in (*self.training, *self.evaluations)), default=0)


def read_folders(names: Sequence[str]) -> list[Folder]:
    """Raises ConfigError for what is no workdir."""
    paths = [as_path(name) for name in names]
    for name, path in zip(names, paths, strict=True):
        require((path / "config.json").exists(), "DIR", name, "is not a workdir of `clipjax train`: it has no config.json")
    return [_read(path, name) for path, name in zip(paths, _short(paths), strict=True)]


def _read(path: Path, name: str) -> Folder:
    metrics = path / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    parsed = [line for text in lines if (line := _parse(text)) is not None]
    training = [line for line in parsed if "task" not in line]
    evaluations = [line for line in parsed if "task" in line]
    return Folder(path, name, _config(path / "config.json"), training, evaluations)


def _config(path: Path) -> dict[str, Any]:
    """With the fields that came after the run was made, at their defaults. Of classes that are not registered now, as it is.

    Raises ConfigError for a file of others, as an exported model has one of this name."""
    text = path.read_text(encoding="utf-8")
    found = _parse(text)
    ours = isinstance(found, dict) and {"train", "data", "seed"} <= found.keys()
    require(ours, "DIR", str(path.parent), "is not a workdir of `clipjax train`: its config.json is not that of a run")
    with contextlib.suppress(config.ConfigError):
        text = config.to_json(config.from_json(text))
    return json.loads(text)


def _parse(text: str) -> Line | None:
    """None for what is no JSON, as the last line of a run that is writing it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _short(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them from each other."""
    parts = [resolve(path).parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{names[-1]} ({i})" for i, names in enumerate(parts, 1)]


def differences(folders: Sequence[Folder]) -> list[tuple[str, list[str]]]:
    """The fields of the configurations that are not the same in all runs, each with its value in every run."""
    flat = [_flat(folder.config) for folder in folders]
    names = dict.fromkeys(name for fields in flat for name in fields)
    rows = [(name, [fields.get(name, "–") for fields in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """`{"a": {"b": 1}}` as `{"a.b": "1"}`. The items of a list have their numbers for names."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = {}
    for key, inner in items:
        found |= _flat(inner, f"{name}.{key}" if name else str(key))
    if not found and name:
        return {name: json.dumps(value, ensure_ascii=False)}
    return found


def same_but_for_seed(folders: Sequence[Folder]) -> list[list[int]]:
    """The numbers of the folders whose configurations differ in the seed at most, two or more of them together."""
    groups: dict[str, list[int]] = {}
    for number, folder in enumerate(folders):
        rest = {name: value for name, value in folder.config.items() if name != "seed"}
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(number)
    return [numbers for numbers in groups.values() if len(numbers) > 1]
