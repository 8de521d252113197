"""MTEB's own tasks on a workdir against `clipjax eval`."""

import json

import pytest

pytest.importorskip("mteb", reason="the extra interop: pip install clipjax[interop]")
import tests.torch_reference  # noqa: F401, I001  (first: it lets torchvision be imported)
import jax
import mteb
import numpy as np
from datasets import Dataset, DatasetDict, Image
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification

from clipjax import cli
from clipjax.evals.loaded import LoadedRun
from clipjax.evals.store import checksum
from clipjax.interop.mteb import Model
from tests.interop.conftest import CLASSES

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def metadata(kind, name, category, score):
    known = dict(type=kind, name=name, category=category, main_score=score, modalities=["image", "text"])
    where = dict(dataset={"path": "none", "revision": "none"}, reference=None, date=None, bibtex_citation="")
    what = dict(description=name, eval_splits=["test"], eval_langs=["eng-Latn"], domains=[], task_subtypes=[], license=None)
    return TaskMetadata(**known, **where, **what, annotations_creators=None, dialect=[], sample_creation=None)


class Classes(AbsTaskZeroShotClassification):
    metadata = metadata("ZeroShotClassification", "Classes", "i2t", "accuracy")

    def load_data(self, **_):
        self.data_loaded = True

    def get_candidate_labels(self):
        return [f"a photo of a {name}." for name in CLASSES]


class TextToImage(AbsTaskRetrieval):
    metadata = metadata("Any2AnyRetrieval", "TextToImage", "t2i", "hit_rate_at_1")
    k_values = (1, 5, 10)

    def load_data(self, **_):
        self.data_loaded = True


class ImageToText(TextToImage):
    metadata = metadata("Any2AnyRetrieval", "ImageToText", "i2t", "hit_rate_at_1")


@pytest.fixture(scope="module")
def model(workdir):
    return Model(str(workdir))


def images_of(shown, **columns):
    return Dataset.from_dict({**columns, "image": list(shown.images)}).cast_column("image", Image())


def scores(model, task):
    (result,) = mteb.evaluate(model, task, cache=None, show_progress_bar=False, encode_kwargs={"batch_size": 7}).task_results
    return result.scores["test"][0]


def ours(task, workdir, shown, tmp_path, *options):
    out = tmp_path / "out.json"
    assert not cli.main(["eval", task, str(workdir), "--data", shown.tsv, "--json", str(out), *options])
    return json.loads(out.read_text())["metrics"]


def test_its_zero_shot_accuracy_is_ours(model, workdir, shown, tmp_path):
    task = Classes()
    task.dataset = DatasetDict(test=images_of(shown, label=list(shown.labels)))
    (tmp_path / "templates.txt").write_text("a photo of a {c}.\n")
    found = ours("zeroshot", workdir, shown, tmp_path, "--label-field", "class", "--templates", str(tmp_path / "templates.txt"))
    theirs = scores(model, task)
    assert theirs["accuracy"] == pytest.approx(found["acc1"], abs=1e-6)
    assert theirs["recall"] == pytest.approx(found["mean_per_class_recall"], abs=1e-6)
    assert 0 < found["acc1"] < 1


@pytest.mark.parametrize(("task", "name"), [(TextToImage, "image"), (ImageToText, "text")])
def test_its_hit_rates_are_our_recalls(model, workdir, shown, tmp_path, task, name):
    """MTEB rounds to five digits."""
    pictures = images_of(shown, id=[f"i{n}" for n in range(len(shown.images))])
    pairs = [(f"i{n}", f"t{n}.{m}", text) for n, found in enumerate(shown.captions) for m, text in enumerate(found)]
    texts = Dataset.from_dict({"id": [pair[1] for pair in pairs], "text": [pair[2] for pair in pairs]})
    relevant: dict[str, dict[str, int]] = {}
    for image, text, _ in pairs:
        query, found = (text, image) if name == "image" else (image, text)
        relevant.setdefault(query, {})[found] = 1
    queries, corpus = (texts, pictures) if name == "image" else (pictures, texts)
    asked = task()
    asked.dataset = {"default": {"test": dict(queries=queries, corpus=corpus, relevant_docs=relevant, top_ranked=None)}}
    found, theirs = ours("retrieval", workdir, shown, tmp_path), scores(model, asked)
    for k in (1, 5, 10):
        assert theirs[f"hit_rate_at_{k}"] == round(found[f"{name}_retrieval_recall@{k}"], 5)
    assert 0 < theirs["hit_rate_at_10"] < 1


def test_an_example_with_both_is_their_sum(model, shown):
    batches = [dict(image=[picture], text=["red fox"]) for picture in shown.images[:2]]
    images, text = model.run.encode_image(shown.images[:2]), model.run.encode_text(["red fox"])
    np.testing.assert_allclose(model.encode(batches), images + text, atol=1e-6)


def test_other_weights_have_another_revision(model, workdir):
    """Else MTEB would show the results that it keeps of earlier weights of the same name."""
    assert model.mteb_model_meta.name == "clipjax/tiny"
    again = LoadedRun(str(workdir))
    assert model.mteb_model_meta.revision == f"step-1-{checksum(again.params, again.mesh)[:12]}"
    others = jax.tree.map(lambda x: x + 1, again.params)
    assert checksum(others, again.mesh)[:12] not in model.mteb_model_meta.revision
