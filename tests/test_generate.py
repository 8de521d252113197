"""Captions: the same with and without a cache, and every search finds what an exhaustive one does."""

import functools
import itertools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import clipjax
from clipjax import cli, config
from clipjax.checkpoint import Checkpoints
from clipjax.config import ConfigError
from clipjax.data.images.image import decode
from clipjax.export.formats.table import flatten, unflatten
from clipjax.generate import Beam, Captioner, Greedy, Sample
from clipjax.losses import token_nll
from clipjax.models import clip
from clipjax.sharding import make_mesh, shardings, to_global
from clipjax.train.optimizer import make_optimizer
from clipjax.train.state import initial_state
from clipjax.train.workdir import save_config
from tests.evals.tiny import TOKENIZER, mesh_of

SIZE, IMAGES = 8, 16
SHAPE = dict(width=16, depth=2, heads=2, mlp_dim=32, embed_dim=16)
START = 1


class Words:
    """What a captioner asks of a tokenizer."""

    start_id, pad_id = START, 0

    def __init__(self, end):
        self.end_id = end


def coca(length=8, words=14, image=(), text=(), head=(), **model):
    tower = dict(image_size=SIZE, patch_size=4, pool="cascade", queries=3, pool_heads=2) | SHAPE | dict(image)
    return config.Model(
        image=config.ImageTower(**tower),
        text=config.TextTower(**dict(length=length, vocab_size=words, pool="cls") | SHAPE | dict(text)),
        decoder=config.Decoder(**dict(depth=2, heads=2, mlp_dim=32) | dict(head)),
        **dict(dtype="float32") | model,
    )


CASES = {  # and each has something else beside that a caption must not feel
    "untied, one MLP, cascade": coca(),
    "tied, two MLPs, single, legacy mask": coca(
        image=dict(pool="single"), text=dict(legacy_mask=True), head=dict(tied=True, mlps=2), unroll=4
    ),
    "untied, two MLPs, no pooler, no class token": coca(
        image=dict(pool="cls"), text=dict(pool="eot"), head=dict(mlps=2, depth=3, heads=4, parallel=0.5)
    ),
}
TINY = coca(length=4, words=5)  # whose 21 captions can all be looked at
SEEDS = dict(zip((*CASES.values(), TINY), (17, 16, 66, 181), strict=True))  # their captions differ, and not all are cut off
END = {14: 12, 5: 4}  # by the vocabulary; a row of the larger table is no word


@functools.cache
def weights(model):
    """Far from an initialisation's, so that images have different captions."""
    rng = np.random.default_rng(SEEDS[model])

    def draw(path, x):
        gain = float(path.endswith("scale"))
        return jnp.float32(gain + (0.5 if x.ndim > 1 else 0.2) * rng.standard_normal(x.shape))

    shapes = flatten(jax.eval_shape(lambda: clip.init(model, 0)))
    return unflatten({path: draw(path, x) for path, x in shapes})


@functools.cache
def some_images():
    return np.random.default_rng(0).integers(0, 256, (IMAGES, SIZE, SIZE, 3), np.uint8)


@functools.cache
def without_cache(model):
    """-log p of every token but the first of captions, and logits of what follows all but the last: without a cache."""

    params = weights(model)

    @jax.jit
    def read(images, tokens):
        bound = clip.bind(model, params)
        states = bound.encode_pairs(images, tokens)[2]
        nll = token_nll(states.reshape(-1, states.shape[-1]), bound.words, tokens[:, 1:].reshape(-1))
        return nll.reshape(len(tokens), -1), states @ bound.words.T

    return read


def generate(model, decoding=Greedy(), mesh="1", images=None, index=None):  # noqa: B008
    """Tokens and log-probabilities of images, as numpy."""
    images = some_images() if images is None else images
    index = np.arange(len(images), dtype=np.int32) if index is None else np.asarray(index, np.int32)
    captioner, params = prepared(model, decoding, mesh)
    batch = to_global({"image": images, "index": index}, captioner.mesh)
    return jax.tree.map(np.asarray, captioner.generate(params, batch["image"], batch["index"]))


@functools.cache
def prepared(model, decoding, mesh):
    mesh = mesh_of(mesh)
    captioner = Captioner(model, mesh, IMAGES, Words(END[model.text.vocab_size]), decoding)
    return captioner, jax.device_put(weights(model), shardings(weights(model), mesh))


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("model", CASES.values(), ids=CASES.keys())
def test_greedy_captions_are_the_same_without_a_cache(model):
    """Token by token, with the full prefix each time. The log-probability is the loss's."""
    length, end = model.text.length, END[model.text.vocab_size]
    tokens = np.full((IMAGES, length), end)
    tokens[:, 0] = START
    forced = np.zeros(IMAGES, bool)
    for i in range(1, length):
        logits = np.asarray(without_cache(model)(some_images(), tokens)[1])[:, i - 1, : end + 1]
        best = np.argsort(logits, axis=-1)
        live = ~(tokens[:, 1:i] == end).any(1)
        assert np.diff(np.sort(logits[live], axis=-1)[:, -2:]).min() > 1e-4  # or rounding could choose
        forced = live & (best[:, -1] != end) if i == length - 1 else forced
        tokens[:, i] = np.where(live & (i < length - 1), best[:, -1], end)
    got = generate(model)
    real = np.arange(length) <= (tokens == end).argmax(1)[:, None]
    np.testing.assert_array_equal(got.tokens, np.where(real, tokens, Words.pad_id))
    nll = np.asarray(without_cache(model)(some_images(), tokens)[0])
    np.testing.assert_allclose(got.logprob, -np.where(real[:, 1:], nll, 0).sum(1), rtol=1e-5, atol=1e-5)
    # The captions differ, also in length, so that the test can fail.
    assert forced.any()
    assert not real.all(1).all()
    assert len({tuple(row) for row in tokens}) > IMAGES // 2
    assert len(set(tokens[real])) > 6


MODEL = CASES["untied, one MLP, cascade"]


@pytest.mark.parametrize("decoding", [Beam(beams=1), Sample(top_k=1, temperature=3.0)], ids=["one beam", "top 1"])
def test_is_greedy(decoding):
    got, want = generate(MODEL, decoding), generate(MODEL)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logprob, want.logprob, rtol=1e-6)


@functools.cache
def following():
    """Of TINY: log p of what follows each prefix, float64 [images, words]; a prefix is a tuple of ids after the start."""
    rows = np.array([(START, *row, END[5]) for row in itertools.product(range(4), repeat=2)])
    logits = [np.asarray(without_cache(TINY)(some_images(), np.tile(row, (IMAGES, 1)))[1]) for row in rows]
    found = {}
    for row, x in zip(rows, logits, strict=True):
        for i in range(3):
            found[tuple(row[1 : i + 1].tolist())] = log_softmax(x[:, i])
    return found


def every_caption(rule=lambda logp: logp):
    """Log-probability of each of TINY's captions where those of tokens are changed by a rule, [images]; the last is forced."""
    found = {}
    for n in range(3):
        for row in itertools.product(range(4), repeat=n):
            steps = [rule(following()[row[:i]])[:, token] for i, token in enumerate((*row, 4))]
            found[row] = sum(steps[: 2 if n == 2 else None])  # there is no choice left
    return found


def caption_of(row):
    return tuple(row[1 : row.tolist().index(4)].tolist())


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_wide_beam_finds_the_best(alpha):
    got = generate(TINY, Beam(beams=24, alpha=alpha))
    own = {row: sum(following()[row[:i]][:, t] for i, t in enumerate((*row, 4))) for row in every_caption()}
    rows = list(own)
    scores = np.stack([own[row] / (len(row) + 1) ** alpha for row in rows], axis=1)
    best = [rows[i] for i in scores.argmax(1)]
    assert [caption_of(row) for row in got.tokens] == best
    np.testing.assert_allclose(got.logprob, [own[row][i] for i, row in enumerate(best)], rtol=1e-5)
    assert len(set(best)) > 3


def plain_beam(image, beams, alpha):
    """As the docstring of Beam says, with lists."""
    live, ended = [((), 0.0)], []
    for i in range(3):
        longer = [((*row, t), logprob + following()[row][image, t]) for row, logprob in live for t in range(5) if t == 4 or i < 2]
        best = sorted(longer, key=lambda x: -x[1])[: beams - len(ended)]
        ended += [x for x in best if x[0][-1] == 4]
        live = [x for x in best if x[0][-1] != 4]
    return max(ended, key=lambda x: x[1] / len(x[0]) ** alpha)


def test_two_beams_are_those_of_a_plain_search():
    got = generate(TINY, Beam(beams=2))
    want = [plain_beam(i, 2, 1.0) for i in range(IMAGES)]
    assert [(*caption_of(row), 4) for row in got.tokens] == [row for row, _ in want]
    np.testing.assert_allclose(got.logprob, [logprob for _, logprob in want], rtol=1e-5)
    assert any(plain_beam(i, 1, 1.0) != plain_beam(i, 2, 1.0) for i in range(IMAGES))


def among(logp, decoding):
    """Log of the distribution that is drawn from, by its definition."""
    logp = log_softmax(logp / decoding.temperature)
    for row in logp:
        order = np.argsort(-row)[: decoding.top_k]
        share = np.exp(log_softmax(row[order]))
        kept = order[: np.searchsorted(share.cumsum(), decoding.top_p) + 1]
        row[np.setdiff1d(np.arange(len(row)), kept)] = -np.inf
    return log_softmax(logp)


@pytest.mark.parametrize(
    "decoding", [Sample(temperature=2.0), Sample(temperature=3.0, top_k=3, seed=1), Sample(top_p=0.9, temperature=2.0)], ids=str
)
def test_captions_are_drawn_as_often_as_they_are_likely(decoding):
    n, image = 4096, 3
    got = generate(TINY, decoding, images=np.repeat(some_images()[[image]], n, axis=0))
    counts = dict.fromkeys(every_caption(), 0)
    for row in got.tokens:
        counts[caption_of(row)] += 1
    likely = {row: float(np.exp(p[image])) for row, p in every_caption(lambda logp: among(logp, decoding)).items()}
    assert sum(likely.values()) == pytest.approx(1)
    for row, p in likely.items():
        assert abs(counts[row] / n - p) <= 4.5 * (p * (1 - p) / n) ** 0.5, row
    assert sum(p > 0.02 for p in likely.values()) > 4
    # The log-probability is the model's own, whatever was cut off.
    for row, logprob in zip(got.tokens[:50], got.logprob[:50], strict=True):
        words = (*caption_of(row), 4)
        assert logprob == pytest.approx(sum(following()[words[:i]][image, t] for i, t in enumerate(words)), rel=1e-4)


def test_a_draw_depends_on_the_image_alone():
    """Neither its place in the batch nor padding nor the number of devices changes it; another seed does."""
    decoding = Sample(temperature=2.0)
    want = generate(MODEL, decoding)
    order = np.random.default_rng(0).permutation(IMAGES)
    moved = generate(MODEL, decoding, images=some_images()[order], index=order)
    np.testing.assert_array_equal(moved.tokens, want.tokens[order])
    index = np.where(np.arange(IMAGES) % 3 == 0, -1, np.arange(IMAGES))
    padded = generate(MODEL, decoding, index=index)
    np.testing.assert_array_equal(padded.tokens[index >= 0], want.tokens[index >= 0])
    assert not padded.tokens[index < 0, 1:].any()  # padding has empty captions
    np.testing.assert_array_equal(generate(MODEL, decoding, "8").tokens, want.tokens)
    assert (generate(MODEL, decoding, index=np.arange(IMAGES) + IMAGES).tokens != want.tokens).any()


@pytest.mark.parametrize("mesh", ["8", "2x2x2"])
@pytest.mark.parametrize("decoding", [Greedy(), Beam(beams=3)], ids=["greedy", "beams"])
def test_the_mesh_does_not_matter(decoding, mesh):
    want, got = generate(MODEL, decoding), generate(MODEL, decoding, mesh)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logprob, want.logprob, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sample(temperature=0.0), "temperature = 0.0: must be positive"),
        (lambda: Sample(top_k=0), "top_k = 0: must be positive"),
        (lambda: Sample(top_p=1.5), r"top_p = 1.5: must lie in \(0, 1\]"),
        (lambda: Sample(seed=-1), "seed = -1: must lie in"),
        (lambda: Beam(beams=0), "beams = 0: must be positive"),
        (lambda: Beam(alpha=-1.0), "alpha = -1.0: must not be negative"),
    ],
)
def test_nonsense_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def saved(folder, model):
    run = config.Run(model=model, data=config.Data(spec="emoji"), train=config.Train(steps=3000))
    mesh = make_mesh(run.mesh)
    state = initial_state(run, make_optimizer(run.optim, 3000, jax.eval_shape(lambda: clip.init(model, 0))), mesh)
    larger = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, state.params)
    save_config(run, folder)
    TOKENIZER.save(folder / "tokenizer.json")
    with Checkpoints(folder, run) as checkpoints:
        checkpoints.save(1, replace(state, params=larger))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model = coca(length=TOKENIZER.length, words=TOKENIZER.vocab_size, dtype="bfloat16")
    return saved(tmp_path_factory.mktemp("coca"), model)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(3):
        Image.fromarray(some_images()[i]).resize((20, 12)).save(folder / f"{i}.png")
    (folder / "torn.png").write_bytes((folder / "0.png").read_bytes()[:100])
    (folder / "text.png").write_text("no image")
    return folder


def test_caption_of_files(run, files, tmp_path, capsys):
    paths = [str(files / f"{i}.png") for i in range(3)]
    assert cli.main(["caption", str(run), *paths, "--json", str(tmp_path / "out.json")]) == 0
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())
    assert said == "".join(f"{row['image']}: {row['caption']}\n" for row in rows)
    assert [row["image"] for row in rows] == paths
    assert [list(row) for row in rows] == [["image", "caption", "logprob"]] * 3
    model = clipjax.load(run)
    assert model.caption([*paths, decode(files / "1.png")]) == [row["caption"] for row in (*rows, rows[1])]
    assert all(row["caption"] and row["logprob"] < 0 for row in rows)
    assert model.caption([]) == []
    assert cli.main(["caption", str(run), *paths, "--temperature", "2", "--top-k", "9", "--top-p", ".9", "--seed", "3"]) == 0
    drawn = model.caption(paths, Sample(temperature=2.0, top_k=9, top_p=0.9, seed=3))
    assert capsys.readouterr().out == "".join(f"{path}: {text}\n" for path, text in zip(paths, drawn, strict=True))


def test_caption_of_a_dataset(run, files, tmp_path, capsys, caplog):
    """Images alone, beside a file; what can't be read is left out."""
    command = ["caption", str(run), f"folder:{files}", str(files / "1.png"), "--json", str(tmp_path / "out.json")]
    assert cli.main(command) == 0
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["image"] for row in rows] == ["0", "1", "2", str(files / "1.png")]
    paths = [str(files / f"{i}.png") for i in (0, 1, 2, 1)]
    assert [row["caption"] for row in rows] == clipjax.load(run).caption(paths)
    assert sum("is left out" in r.getMessage() for r in caplog.records) == 2
    capsys.readouterr()
    assert cli.main(["caption", str(run), "folder:nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_beams_from_the_command_line(run, files, capsys):
    assert cli.main(["caption", str(run), str(files / "0.png"), "--beams", "2", "--alpha", "0"]) == 0
    (text,) = clipjax.load(run).caption([files / "0.png"], Beam(beams=2, alpha=0.0))
    assert capsys.readouterr().out == f"{files / '0.png'}: {text}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["missing.png"], "images[0] = 'missing.png': No such file or directory"),
        (["torn.png"], "images[0] = 'torn.png': is no image that can be read: "),
        (["0.png", "text.png"], "images[1] = 'text.png': is no image that can be read: cannot identify"),
        (["0.png", "--top-p", "2"], "top_p = 2.0: must lie in (0, 1]"),
        (["0.png", "--beams", "2", "--top-k", "3"], "--top-k: only for sampled captions; --beams and --alpha"),
        (["0.png", "--beams", "0"], "--beams: 0 must be positive"),
        ([], "required: IMAGE"),
    ],
)
def test_wrong_use_is_reported(run, files, args, message, capsys, monkeypatch):
    monkeypatch.chdir(files)
    try:
        status = cli.main(["caption", str(run), *args])
    except SystemExit as e:
        status = e.code
    assert status == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_model_without_a_head_is_refused():
    model = replace(MODEL, decoder=None)
    with pytest.raises(ConfigError, match=r"model\.decoder = None: only a model with a captioning head generates captions"):
        Captioner(model, mesh_of("1"), IMAGES, TOKENIZER)
