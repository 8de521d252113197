"""TFDS's ImageNet sets as they are stored, with wnids for names: a stand-in of a few images."""

import re
from types import MappingProxyType

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from clipjax import config
from clipjax.evals.encoder import Encoder
from clipjax.evals.names.sets import class_sets
from clipjax.evals.zeroshot import ZeroshotEvaluation
from tests.evals.tiny import MODEL, TOKENIZER, mesh_of

WNIDS = class_sets()["imagenet1k"].ids
LABELS = (6, 999, 6, 11)  # 999 is in neither subset, 6 and 11 are the first two of ImageNet-A


def builder_of(dataset):
    """A builder of four images that TFDS takes for `dataset`."""

    class Builder(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = MappingProxyType({})  # see clipjax.data.sets.emoji
        name = dataset

        def _info(self):
            label = tfds.features.ClassLabel(names=list(WNIDS))
            features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": label, "file_name": tfds.features.Text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"test": self._generate_examples()}

        def _generate_examples(self):
            for i, label in enumerate(LABELS):
                yield i, {"image": Image.new("RGB", (8, 8), (60 * i, 0, 0)), "label": label, "file_name": f"{i}.jpg"}

    return Builder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    for dataset in ("imagenet2012", "imagenet_a"):
        builder_of(dataset)(data_dir=folder, file_format="array_record").download_and_prepare(download_dir=folder / "downloads")
    return folder


@pytest.mark.parametrize(("dataset", "classes", "first"), [("imagenet2012", 1000, "tench"), ("imagenet_a", 200, "stingray")])
def test_prompts_are_words(folder, monkeypatch, capsys, params, dataset, classes, first):
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    encoder, data = Encoder(MODEL, mesh_of("1"), 64), config.Data(spec=f"tfds:{dataset}", split="test", workers=1)
    evaluation = ZeroshotEvaluation.prepare(encoder, TOKENIZER, data, config.Zeroshot(templates="plain"))
    said = capsys.readouterr().err
    assert f"tfds:{dataset}/test: {classes:,} classes, named by imagenet" in said
    assert f"the first prompt is '{first}'" in said
    assert len(evaluation.classes.names) == classes
    assert not any(re.search(r"n\d{8}", name) for name in evaluation.classes.names)
    found = evaluation.run(params)
    assert found.predictions.nearest.max() < classes
    images, names = (("0.jpg", "2.jpg", "3.jpg"), ["goldfinch", "stingray", "stingray"])
    if classes == 1000:
        images, names = ("0.jpg", "1.jpg", "2.jpg", "3.jpg"), ["goldfinch", "stingray", "stingray", "toilet paper"]
    assert sorted(found.examples[0].keys) == list(images)
    assert sorted(found.examples[0].facts["class"]) == names
    assert found.metrics["acc1"] == np.mean([a == b for a, b in zip(*found.examples[0].facts.values(), strict=True)])
