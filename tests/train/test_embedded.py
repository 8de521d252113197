"""data.embeddings: a file of embeddings stands for a frozen tower, whose input is not read and which does not run."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from clipjax import build, config, hlo, sharding
from clipjax.config import Augment, ConfigError, Data, Filter, Run
from clipjax.data.sources import open_source
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.embed import embed, write_npz
from clipjax.evals.embedded import agreement
from clipjax.evals.encoder import Encoder
from clipjax.metrics.flops import run_flops
from clipjax.models import clip
from clipjax.plan.program import lower_step, state_of
from clipjax.train.optimizer import optimizer_of
from clipjax.train.state import initial_state
from clipjax.train.step import jit_step, make_train_step
from tests.data.conftest import IMAGES, write_tsv
from tests.train import tiny


def locked(side, file=None, **data):
    model = dataclasses.replace(tiny.CLIP, **{side: dataclasses.replace(getattr(tiny.CLIP, side), unlock=0)})
    return tiny.run(model, data=Data(**dict(spec="emoji", embeddings=file) | data))


@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 1)], ids=str)
def test_the_step_is_the_same(side, axes):
    """The weights after two steps, with the embeddings in place of the tower."""
    mesh, ends = tiny.mesh_of(*axes), []
    for run in (locked(side), locked(side, "of.npz")):
        tx = optimizer_of(run, clip.init(run.model, run.seed))
        state = initial_state(run, tx, mesh)
        step = jit_step(make_train_step(run, tx, mesh), state, mesh)
        model = clip.bind(run.model, clip.init(run.model, run.seed))
        for batch in tiny.batches(run, 2):
            if run.embedded:
                z = model.encode_image(batch["image"]) if side == "image" else model.encode_text(batch["text"])
                batch["embedded"] = np.asarray(z)
            if run.embedded == "image":
                del batch["image"]
            state, metrics = step(state, sharding.to_global(batch, mesh))
        ends.append((float(metrics["loss"]), np.asarray(state.params["log_scale"]), np.asarray(state.params["text"]["tokens"])))
    for one, other in zip(*ends, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)  # Adam makes full steps of small gradients, too


def test_it_costs_what_the_other_tower_does():
    mesh = tiny.mesh_of()
    run, costs = locked("image", "of.npz"), {}
    for name, one in (("locked", locked("image")), ("embedded", run)):
        costs[name] = hlo.cost(lower_step(one, mesh, state_of(one, mesh)).compile().as_text()).flops
    params, size = clip.init(run.model, 0), run.train.batch_size
    text = clip.facts(run.model)["text"].flops
    assert run_flops(run, params) == 3 * text
    loss = costs["embedded"] - 3 * text * size
    assert 0 <= loss < 0.1 * costs["embedded"]
    saved = (run_flops(locked("image"), params) - run_flops(run, params)) * size
    assert costs["locked"] - costs["embedded"] == pytest.approx(saved, rel=0.01)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A table of images, its tokenizer, and the embeddings of its examples but the fourth, whose image can't be read."""
    folder = tmp_path_factory.mktemp("embedded")
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    table = write_tsv(folder, [(f"{i}.png", f"number {i}") for i in range(IMAGES)])
    (folder / "3.png").write_bytes(b"torn")
    data = Data(spec=f"tsv:{table}")
    words = Tokenizer.train(open_source(data).captions(), 400, True, tiny.CLIP.text.length)
    encoder = Encoder(tiny.CLIP, tiny.mesh_of(), 8)
    write_npz(folder / "of.npz", embed(encoder, clip.init(tiny.CLIP, 0), words, data))
    return folder, table, words


def test_batches_have_vectors_and_no_image_is_read(written):
    folder, table, words = written
    run = locked("image", str(folder / "of.npz"), spec=f"tsv:{table}", workers=2)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, batch_size=8))
    source = open_source(run.data)
    found = build.embedded(run, source)
    stored = {i: (folder / f"{i}.png").read_bytes() for i in range(IMAGES)}
    for i in stored:
        (folder / f"{i}.png").unlink()
    with build.batches(run, source, words, embedded=found)(0) as stream:
        batches = list(itertools.islice(stream, IMAGES // 8))
    for i, content in stored.items():
        (folder / f"{i}.png").write_bytes(content)
    arrays = np.load(folder / "of.npz")
    want = dict(zip(arrays["key"].tolist(), arrays["image"], strict=True))
    replaced = {int(i) for batch in batches for i in batch["index"][batch["replaced"]]}
    assert replaced <= {3}
    for batch in batches:
        assert "image" not in batch
        for i, z in zip(batch["index"].tolist(), batch["embedded"], strict=True):
            if i not in replaced:
                np.testing.assert_array_equal(z, want[f"{i}.png"])


@pytest.mark.parametrize("side", ["image", "text"])
def test_the_file_must_be_of_these_weights(written, side):
    folder, table, words = written
    run = locked(side, str(folder / "of.npz"), spec=f"tsv:{table}")
    source = open_source(run.data)
    check = agreement(run, tiny.mesh_of(2), words, source, build.embedded(run, source))
    check(clip.init(run.model, 0))
    with pytest.raises(ConfigError, match=rf"data\.embeddings = .*of their norm from what the {side} tower of this run gives"):
        check(clip.init(run.model, 1))


def test_a_file_of_other_data_is_refused(written, tmp_path):
    table = written[1]
    np.savez(tmp_path / "few.npz", image=jnp.zeros((2, 16)), key=["0.png", "1.png"])
    run = locked("image", str(tmp_path / "few.npz"), spec=f"tsv:{table}")
    with pytest.raises(ConfigError, match=r"data\.embeddings = .*has no row for \d+ of the"):
        build.embedded(run, open_source(run.data))
    np.savez(tmp_path / "wide.npz", image=np.zeros((IMAGES, 5), np.float32), key=[f"{i}.png" for i in range(IMAGES)])
    run = locked("image", str(tmp_path / "wide.npz"), spec=f"tsv:{table}")
    with pytest.raises(ConfigError, match=r"its vectors have 5 numbers, and the model's 16"):
        build.embedded(run, open_source(run.data))


IMAGE0 = dataclasses.replace(tiny.CLIP, image=dataclasses.replace(tiny.CLIP.image, unlock=0))
TEXT0 = dataclasses.replace(tiny.CLIP, text=dataclasses.replace(tiny.CLIP.text, unlock=0))
REFUSED = {
    "trained": (
        tiny.CLIP,
        {},
        r"data\.embeddings = 'a\.npz': stands for a tower that is wholly frozen",
    ),
    "both": (dataclasses.replace(IMAGE0, text=TEXT0.text), {}, "nothing left to train"),
    "augmented": (IMAGE0, dict(augment=Augment(crop=0.5)), r"data\.augment = .*: data\.embeddings are of whole images"),
    "filtered": (IMAGE0, dict(filter=Filter(min_side=8)), r"data\.filter = .*need images"),
    "dropped": (
        dataclasses.replace(IMAGE0, image=dataclasses.replace(IMAGE0.image, patch_dropout=0.5)),
        {},
        r"model\.image\.patch_dropout = 0\.5",
    ),
    "captions": (TEXT0, dict(captions_per_image=2), r"data\.captions_per_image = 2: .*main caption"),
    "decoder": (dataclasses.replace(tiny.COCA, image=dataclasses.replace(tiny.COCA.image, unlock=0)), {}, r"model\.decoder"),
}


@pytest.mark.parametrize(("model", "data", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_changes_from_visit_to_visit_is_refused(model, data, message):
    with pytest.raises(ConfigError, match=message):
        Run(data=Data(spec="emoji", embeddings="a.npz", **data), model=model)


def test_augmented_text_is_no_matter():
    assert Run(data=Data(spec="emoji", embeddings="a.npz", augment=Augment(crop=0.5)), model=TEXT0).embedded == "text"
    assert config.from_json(config.to_json(locked("image", "a.npz"))).embedded == "image"
