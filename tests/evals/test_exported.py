"""A dataset exported as CLIP_benchmark exports it has the figures of the dataset itself."""

import io

import numpy as np
import pytest
from PIL import Image

from clipjax import config
from clipjax.config import Data
from clipjax.evals.encoder import Encoder
from clipjax.evals.training import prepare
from tests.data import shards
from tests.evals.tiny import MODEL, TOKENIZER, WORDS, mesh_of


@pytest.fixture(scope="module")
def encoder():
    return Encoder(MODEL, mesh_of("1"), 13)


def webp(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "webp", lossless=True)
    return file.getvalue()


def figures(encoder, params, wanted):
    run = config.Run(model=MODEL, data=Data(spec="emoji"), evals=())
    return prepare(wanted, encoder, TOKENIZER, run.data).run(params)


def test_zeroshot_and_retrieval(encoder, params, images, tsv, tmp_path, capsys):
    labels, captions = [*range(9), 0], [f"{word}\na photo of the {word}" if i == 2 else word for i, word in enumerate(WORDS)]
    pictures = [b"no image" if i == 4 else webp(image) for i, image in enumerate(images[:10])]
    facts = dict(classnames="\n".join(WORDS) + "\n", zeroshot_classification_templates="{c}\n")
    classes = shards.benchmark(tmp_path / "classes", zip(pictures, labels, strict=True), **facts)
    texts = [*captions[:9], captions[0]]
    pairs = shards.benchmark(tmp_path / "pairs", zip(pictures, texts, strict=True), dataset_type="retrieval\n")
    own = f"tsv:{tsv}/pairs.tsv"
    exported = figures(encoder, params, config.Zeroshot(data=f"wds:{classes}", split="test"))
    stored = figures(encoder, params, config.Zeroshot(data=own, classnames=str(tsv / "names.txt"), templates="plain"))
    assert exported.metrics == stored.metrics
    assert 0 < exported.metrics["acc5"] < 1
    assert "11 classes, named by" in capsys.readouterr().err
    found = [figures(encoder, params, config.Retrieval(data=spec)).metrics for spec in (f"wds:{pairs}", own)]
    assert found[0] == found[1]


def test_several_labels(encoder, params, images, tmp_path):
    rows = [np.eye(11, dtype=np.int64)[[i, (3 * i + 1) % 11]].max(0) for i in range(10)]
    facts = dict(classnames="\n".join(WORDS) + "\n", dataset_type="multilabel\n")
    root = shards.benchmark(tmp_path / "set", zip(map(webp, images[:10]), rows, strict=True), **facts)
    found = figures(encoder, params, config.Zeroshot(data=f"wds:{root}"))
    assert found.metrics.keys() == {"mean_average_precision"}
    assert 0 < found.metrics["mean_average_precision"] < 1
