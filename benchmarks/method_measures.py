"""Figures of a run that `clipjax eval` does not give: queries of two captions, and two stages' vectors together.

Each function takes workdirs and gives lines as those of metrics.jsonl.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from method_data import TONE, halves, records
from PIL import Image

import clipjax
from clipjax.evals.geometry import rankme

Line = dict[str, Any]


def unit(z: np.ndarray) -> np.ndarray:
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def recall(scores: np.ndarray, among: np.ndarray | None = None) -> float:
    """R@1 of the diagonal, among those columns [n, n] that are True, the query's own always. A tie is no hit."""
    rivals = np.where(np.eye(len(scores), dtype=bool), -np.inf, scores)
    if among is not None:
        rivals = np.where(among, rivals, -np.inf)
    return float((np.diag(scores) > rivals.max(1)).mean())


def neighbours(train: np.ndarray, test: np.ndarray, of_train: list[str], of_test: list[str], k: int = 20) -> float:
    """Share of test vectors whose k nearest training vectors vote for their class, by exp(cosine / .07)."""
    classes = sorted(set(of_train))
    member = np.array([[name == one for one in classes] for name in of_train], float)
    cosines = test @ train.T
    cosines[cosines < np.sort(cosines, 1)[:, -k, None]] = -np.inf
    votes = np.exp(cosines / 0.07) @ member
    return float(np.mean([classes[best] == name for best, name in zip(votes.argmax(1), of_test, strict=True)]))


def of_features(workdir: Path, head: str) -> list[Line]:
    """Skin tones of held-out pictures by their nearest training pictures: by the head's vectors, and by the tower's before it."""
    toned = {split: [r for r in records(split) if len(TONE.findall(r.captions[0])) == 1] for split in ("train", "test")}
    pictures = {split: [Image.open(io.BytesIO(r.image)) for r in some] for split, some in toned.items()}
    tones = {split: [halves(r.captions[0])[1] for r in some] for split, some in toned.items()}
    after, before = clipjax.load(str(workdir), features=(head,)), clipjax.load(str(workdir), features="tower")
    metrics = {}
    for name, model in (("before", before), ("after", after)):
        train, test = (unit(model.encode_image(pictures[split])) for split in ("train", "test"))
        metrics[f"knn_acc1@20_{name}"] = neighbours(train, test, tones["train"], tones["test"])
        metrics[f"rankme_{name}"] = rankme(np.linalg.svd(test, compute_uv=False))
    return [{"step": after.step, "task": "features", "dataset": "emoji/test", "metrics": metrics}]


def embedded(workdir: Path) -> tuple["clipjax.evals.loaded.LoadedRun", np.ndarray, list[str]]:
    """The run, its vectors of the held-out pictures, and their names."""
    model = clipjax.load(str(workdir))
    held = list(records("test"))
    return model, model.encode_image([Image.open(io.BytesIO(record.image)) for record in held]), [r.captions[0] for r in held]


def of_halves(workdir: Path) -> list[Line]:
    """Held-out pictures by the two halves of their names, as a sum and as a product of vectors, and by the first half alone."""
    model, images, names = embedded(workdir)
    nouns, tones = map(list, zip(*map(halves, names), strict=True))
    y, z = model.encode_text(nouns), model.encode_text(tones)
    queries = {"noun": y, "sum": unit(y + z), "product": y * z}
    metrics = {f"recall@1_of_{name}": recall(query @ images.T) for name, query in queries.items()}
    return [{"step": model.step, "task": "halves", "dataset": "emoji/test", "metrics": metrics}]


def of_stages(first: Path, second: Path, clusters: Path) -> list[Line]:
    """Held-out pictures by their names: of two stages and of both together, among all and within the first stage's clusters."""
    spaces = []
    for workdir in (first, second):
        model, images, names = embedded(workdir)
        spaces.append((images, model.encode_text(names)))
    with np.load(clusters) as file:
        cluster = (spaces[0][0] @ unit(file["centroid"]).T).argmax(1)
    same = cluster[:, None] == cluster[None, :]
    metrics = {}
    both = [np.concatenate([space[side] for space in spaces], 1) for side in (0, 1)]
    for name, (images, texts) in zip(("first", "second", "both"), (*spaces, both), strict=True):
        metrics[f"recall@1_{name}"] = recall(texts @ images.T)
        metrics[f"recall@1_within_clusters_{name}"] = recall(texts @ images.T, same)
    return [{"step": model.step, "task": "stages", "dataset": "emoji/test", "metrics": metrics}]
