"""CLIP_benchmark's own functions on a workdir against `clipjax eval`."""

import json
import sys

import pytest

pytest.importorskip("clip_benchmark", reason="the extra interop: pip install clipjax[interop]")
import tests.torch_reference  # noqa: F401, I001  (first: it lets torchvision be imported)
import torch
from clip_benchmark.metrics import image_caption_selection, zeroshot_classification, zeroshot_retrieval
from clip_benchmark.models import MODEL_TYPES, load_clip

from clipjax import cli
from clipjax.evals.prompts import templates
from clipjax.interop import clip_benchmark
from tests.interop.conftest import CLASSES

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Examples(torch.utils.data.Dataset):
    """Example i is (image, target): a label or the captions."""

    classes = CLASSES

    def __init__(self, images, targets, transform):
        self.images, self.targets, self.transform = images, targets, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.targets[i]


def together(batch):
    images, captions = zip(*batch, strict=True)
    return torch.stack(images), captions


@pytest.fixture(scope="module")
def loaded(workdir):
    clip_benchmark.register()
    clip_benchmark.register()
    assert MODEL_TYPES.count("clipjax") == 1
    return load_clip(model_type="clipjax", model_name="clipjax", pretrained=str(workdir), cache_dir=None, device="cpu")


def ours(task, workdir, shown, tmp_path, *options):
    out = tmp_path / "out.json"
    assert not cli.main(["eval", task, str(workdir), "--data", shown.tsv, "--json", str(out), *options])
    return json.loads(out.read_text())["metrics"]


def test_its_zero_shot_metrics_are_ours(loaded, workdir, shown, tmp_path):
    model, transform, tokenizer = loaded
    loader = torch.utils.data.DataLoader(Examples(shown.images, shown.labels, transform), batch_size=7)
    classes, prompts = list(CLASSES), list(templates("simple"))
    theirs = zeroshot_classification.evaluate(model.eval(), loader, tokenizer, classes, prompts, "cpu", amp=False)
    found = ours("zeroshot", workdir, shown, tmp_path, "--label-field", "class")
    assert {name: found[name] for name in theirs} == pytest.approx(theirs, abs=1e-6)
    assert len(theirs) == 3
    assert 0 < found["acc1"] < 1


def test_its_retrieval_metrics_are_ours(loaded, workdir, shown, tmp_path):
    model, transform, tokenizer = loaded
    loader = torch.utils.data.DataLoader(Examples(shown.images, shown.captions, transform), batch_size=12, collate_fn=together)
    theirs = zeroshot_retrieval.evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    found = ours("retrieval", workdir, shown, tmp_path)
    assert {name: found[name] for name in theirs} == pytest.approx(theirs, abs=1e-6)
    assert len(theirs) == 6
    assert 0 < theirs["image_retrieval_recall@10"] < 1


def test_its_choices_between_pictures_and_captions_are_ours(loaded, workdir, shown, tmp_path):
    """Pairs as Winoground's, and a picture with a right and a wrong caption as SugarCrepe's."""
    model, transform, tokenizer = loaded
    file = tmp_path / "questions.json"
    for pictures in ((0, 7), (5,)):
        questions = [([(i + k) % 24 for k in pictures], [shown.captions[(i + k) % 24][0] for k in (0, 7)]) for i in range(24)]
        file.write_text(
            json.dumps([{"images": [f"{i}.png" for i in numbers], "captions": texts} for numbers, texts in questions])
        )
        batch = torch.stack([torch.stack([transform(shown.images[i]) for i in numbers]) for numbers, _ in questions])
        loader = [(batch, [texts for _, texts in questions])]
        theirs = image_caption_selection.evaluate(model, loader, tokenizer, "cpu", amp=False)
        found = ours("choice", workdir, shown, tmp_path, "--questions", str(file))
        if len(pictures) == 2:
            same = dict(image_acc=found["image_score"], acc=found["group_score"])
        else:
            same = dict(image_acc=1.0, acc=found["text_score"])  # there is one picture to choose from: ours is null
            assert found["image_score"] is None
        assert theirs == pytest.approx(same | {"text_acc": found["text_score"]}, abs=1e-6)
        assert 0 < found["image_score" if len(pictures) == 2 else "text_score"] < 1


def test_what_it_is_given(loaded, workdir, shown):
    """Images of other sizes become those of the run, by the run's own `data.resize`; texts its tokens."""
    model, transform, tokenizer = loaded
    pixels, tokens = transform(shown.images[0]), tokenizer(["red fox", "x"])
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (8, 8, 3))
    assert transform.resize == "crop"
    assert (tokens.dtype, tuple(tokens.shape)) == (torch.int32, (2, 24))
    assert torch.equal(model.encode_image(pixels[None]), torch.from_numpy(model.run.encode_image([shown.images[0]])))
    assert torch.equal(model.encode_text(tokens), torch.from_numpy(model.run.encode_text(["red fox", "x"])))


def test_its_command_line(workdir, tmp_path, monkeypatch, capsys):
    """The options that a run needs are given; a run that is not there ends as `clipjax eval` does."""
    monkeypatch.chdir(tmp_path)
    command = ["clip_benchmark", "eval", "--dataset", "dummy", "--pretrained"]
    monkeypatch.setattr(sys, "argv", [*command, "absent"])
    with pytest.raises(SystemExit) as ended:
        clip_benchmark.main()
    assert ended.value.code == 2
    assert "absent" in capsys.readouterr().err
