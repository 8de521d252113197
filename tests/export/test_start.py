"""From another library's weights and back: import, the first loss, two steps, an export that is verified in PyTorch."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from clipjax import build, cli, config
from clipjax.checkpoint import TOKENIZER
from clipjax.config import ConfigError
from clipjax.data.sources import open_source
from clipjax.data.tokenizer import Tokenizer
from clipjax.export.open_clip import WEIGHTS
from clipjax.export.open_clip_read import CONFIG
from clipjax.train.weights import find_weights
from tests.export import standins_transformers
from tests.export.models import LENGTH
from tests.export.standins_transformers import torch
from tests.export.test_import import THEIRS, open_clip

PAIRS, BATCH = 24, 8


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    rng, rows = np.random.default_rng(0), ["filepath\ttitle"]
    for i in range(PAIRS):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i}.png\twoman waving number {i}")
    (folder / "pairs.tsv").write_text("\n".join(rows) + "\n")
    return folder / "pairs.tsv"


def clip_loss(model, pixels, ids):
    return model(input_ids=ids, pixel_values=pixels, return_loss=True).loss


def coca_loss(model, pixels, ids):
    found = model(pixels, ids)
    loss = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
    features = found["image_features"], found["text_features"]
    return sum(loss(*features, found["logits"], ids[:, 1:], found["logit_scale"]))


def coca(folder, tokenizer):
    kind, cfg = THEIRS["CoCa"]
    torch.manual_seed(0)
    model = kind(**cfg).eval()
    torch.nn.init.normal_(model.text_decoder.text_projection, std=0.2)
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(dict(model_cfg=cfg, preprocess_cfg=dict(resize_mode="squash"))))
    safetensors.torch.save_file(model.state_dict(), folder / WEIGHTS)
    shutil.copy(tokenizer, folder / "tokenizer.json")
    return model


def of_transformers(make):
    def written(folder, tokenizer):
        model = make()
        standins_transformers.written(folder, model, tokenizer)
        return model

    return written


SIGLIP2 = dict(vision=dict(image_size=36, hidden_act="gelu_pytorch_tanh"), text=dict(hidden_act="gelu_pytorch_tanh"))
SOURCES = {
    "CLIP": ("transformers", of_transformers(standins_transformers.clip), clip_loss),
    "SigLIP": ("transformers", of_transformers(lambda: standins_transformers.siglip(dict(hidden_act="gelu"))), clip_loss),
    "SigLIP 2": ("transformers", of_transformers(lambda: standins_transformers.siglip(**SIGLIP2)), clip_loss),
    "CoCa": ("open_clip", coca, coca_loss),
}


@pytest.mark.parametrize(
    ("library", "make", "loss"),
    [pytest.param(*source, marks=pytest.mark.slow if name == "CoCa" else ()) for name, source in SOURCES.items()],
    ids=SOURCES.keys(),
)
def test_there_two_steps_and_back(tmp_path, tokenizer, pairs, capsys, library, make, loss):
    theirs = make(tmp_path / "theirs", tokenizer)
    assert cli.main(["import", "--from", library, str(tmp_path / "theirs"), "--out", str(tmp_path / "run")]) == 0
    (tmp_path / "tune.py").write_text(TUNE.format(run=tmp_path / "run", pairs=pairs, batch=BATCH))
    assert cli.main(["train", str(tmp_path / "tune.py"), "--workdir", str(tmp_path / "tuned")]) == 0
    assert "came: " in capsys.readouterr().err
    lines = map(json.loads, (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines())
    first = next(line["loss"] for line in lines if "loss" in line)

    run = config.from_json((tmp_path / "tuned" / "config.json").read_text())
    words = Tokenizer.load(tmp_path / "tuned" / TOKENIZER, LENGTH, run.tokenizer.clean)
    with build.batches(run, open_source(run.data), words)(0) as batches:
        batch = next(batches)
    mean, std = np.float32(run.model.image.mean), np.float32(run.model.image.std)
    pixels = torch.from_numpy(((np.float32(batch["image"]) / 255 - mean) / std).transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        want = float(loss(theirs, pixels, torch.from_numpy(batch["text"]).long()))
    assert first == pytest.approx(want, rel=1e-5)

    out = ["export", str(tmp_path / "tuned"), "--to", library, "--out", str(tmp_path / "out"), "--verify", "--examples", "6"]
    assert cli.main(out) == 0, capsys.readouterr().err


TUNE = """
from clipjax.config import Cosine, Optim, Train, start_from

def config():
    train = Train(steps=2, batch_size={batch}, log_every=1, checkpoint_every=2)
    data = dict(spec="tsv:{pairs}")
    return start_from("{run}", data=data, train=train, optim=Optim(lr=1e-3, schedule=Cosine(warmup=1)))
"""


def test_a_clamp_that_would_move_the_scale_is_refused(tmp_path, tokenizer, pairs):
    model = standins_transformers.siglip()
    with torch.no_grad():
        model.logit_scale.fill_(4.72)  # So400m's
    standins_transformers.written(tmp_path / "theirs", model, tokenizer)
    assert cli.main(["import", "--from", "transformers", str(tmp_path / "theirs"), "--out", str(tmp_path / "run")]) == 0
    run = config.start_from(tmp_path / "run", data=dict(spec=f"tsv:{pairs}"))
    assert run.model.max_scale is None
    clamped = config.start_from(tmp_path / "run", data=dict(spec=f"tsv:{pairs}"), model=dict(max_scale=100.0))
    with pytest.raises(ConfigError, match=r"model\.max_scale = 100\.0: the scale of .* is 112\.17, .*set it to None"):
        find_weights(clamped)
