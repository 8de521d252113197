import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import clipjax
from clipjax import config, environment
from clipjax.checkpoint import Checkpoints
from clipjax.evals.encoder import Encoder
from clipjax.evals.loaded import mesh_for
from clipjax.models import clip
from clipjax.sharding import make_mesh
from clipjax.train.optimizer import make_optimizer
from clipjax.train.state import initial_state
from clipjax.train.workdir import save_config
from tests.evals.tiny import MODEL, TOKENIZER, WORDS


@pytest.mark.parametrize(
    ("trained", "available"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((-1, 4, 1), (2, 4, 1)),
        ((32, 4, 2), (1, 4, 2)),  # on 256 devices
        ((1, 2, 1), (4, 2, 1)),  # on two
        ((2, -1, 1), (2, 4, 1)),
        ((16, -1, 1), (8, 1, 1)),
        ((-1, 16, 1), (8, 1, 1)),
    ],
)
def test_the_mesh_is_that_of_training_where_it_fits(trained, available):
    assert tuple(mesh_for(config.Mesh(**dict(zip(("data", "fsdp", "tensor"), trained, strict=True)))).shape.values()) == (
        1,
        *available,
    )


def save(run: config.Run, workdir: Path) -> Path:
    """The folder of a run that has its first weights."""
    mesh = make_mesh(run.mesh)
    state = initial_state(run, make_optimizer(run.optim, 3000, jax.eval_shape(lambda: clip.init(run.model, 0))), mesh)
    save_config(run, workdir)
    TOKENIZER.save(workdir / "tokenizer.json")
    with Checkpoints(workdir, run) as checkpoints:
        checkpoints.save(1, state)
    return workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save(
        config.Run(data=config.Data(spec="emoji"), model=MODEL, train=config.Train(steps=3000)), tmp_path_factory.mktemp("loaded")
    )


@pytest.fixture(scope="module")
def loaded(workdir):
    return clipjax.load(workdir)


def test_a_run_is_loaded_in_shards(tmp_path):
    """A model that is trained with fsdp and tensor is evaluated with them. The vectors are those of a single axis."""
    save(
        config.Run(
            data=config.Data(spec="emoji"), model=MODEL, mesh=config.Mesh(fsdp=2, tensor=2), train=config.Train(steps=3000)
        ),
        tmp_path,
    )
    sharded = clipjax.load(tmp_path)
    assert dict(sharded.mesh.shape) == {"slice": 1, "data": 2, "fsdp": 2, "tensor": 2}
    kernel = sharded.params["text"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size / 4
    seen = sharded.encode_text(WORDS)

    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"mesh": {"data": -1, "fsdp": 16, "tensor": 1}}))
    plain = clipjax.load(tmp_path)
    assert dict(plain.mesh.shape) == {"slice": 1, "data": 8, "fsdp": 1, "tensor": 1}
    np.testing.assert_allclose(plain.encode_text(WORDS), seen, atol=1e-6)


def test_few_rows_take_a_small_batch(loaded, monkeypatch):
    sizes = []
    real = Encoder.stream

    def stream(encoder, params, batches):
        sizes.append(encoder.batch_size)
        return real(encoder, params, batches)

    monkeypatch.setattr(Encoder, "stream", stream)
    found = {n: loaded.encode_text(["a fox"] * n) for n in (1, 8, 9, 17, 300)}
    loaded.encode_image([np.zeros((5, 4, 3), np.uint8)])
    assert sizes == [8, 8, 16, 32, 256, 8]  # a multiple of the eight devices
    assert [len(z) for z in found.values()] == list(found)
    for z in found.values():
        np.testing.assert_allclose(z, np.broadcast_to(found[1], z.shape), atol=1e-6)


PIXELS = np.zeros((4, 5, 3), np.uint8)
NO_IMAGES = [
    (None, TypeError, "images: is of type NoneType; expected a list"),
    (3, TypeError, "images: is of type int; expected a list"),
    ("a.png", TypeError, "images: is one str; expected a list"),
    (Image.new("RGB", (2, 2)), TypeError, "images: is of type Image; expected a list"),
    ({"a": PIXELS}, TypeError, "images: is of type dict; expected a list"),
    (np.array(None), TypeError, "images: is of type ndarray; expected a list"),
    (PIXELS, ValueError, r"images: is one array of shape \[4, 5, 3\]; expected a list, or uint8 \[n, h, w, 3\]"),
    ([PIXELS, None], TypeError, r"images\[1\]: is of type NoneType; expected a PIL image, a file name or a uint8 array"),
    ([PIXELS.tolist()], TypeError, r"images\[0\]: is of type list; expected"),
    ([float("nan")], TypeError, r"images\[0\]: is of type float; expected"),
    ([b"abc"], TypeError, r"images\[0\]: is of type bytes; expected"),
    ([np.full((4, 5, 3), np.nan)], ValueError, r"images\[0\]: is float64 \[4, 5, 3\]; expected .*astype\(np.uint8\)"),
    ([PIXELS.astype(np.uint16)], ValueError, r"images\[0\]: is uint16 \[4, 5, 3\]; expected"),
    (np.zeros((2, 4, 5, 3), np.float32), ValueError, r"images\[0\]: is float32 \[4, 5, 3\]; expected"),
    ([PIXELS[..., 0]], ValueError, r"images\[0\]: is uint8 \[4, 5\]; expected"),
    ([PIXELS.transpose(2, 0, 1)], ValueError, r"images\[0\]: is uint8 \[3, 4, 5\]; expected"),
    ([PIXELS[:0]], ValueError, r"images\[0\]: is uint8 \[0, 5, 3\]; expected"),
    ([Image.new("RGB", (0, 3))], ValueError, r"images\[0\]: has no pixels; expected"),
    ([Image.fromarray(np.zeros((4, 4), np.float32))], ValueError, r"images\[0\]: is no image that can be read: mode F"),
    ([Image.fromarray(np.full((4, 4), 70_000, np.int32))], ValueError, r"images\[0\]: is no image that can be read: mode I"),
    (["s3://bucket/a.png"], config.ConfigError, r"images\[0\] = 's3://bucket/a.png': must be on this machine"),
    (["/absent.png"], config.ConfigError, r"images\[0\] = '/absent.png': No such file or directory"),
    (["a\0b"], config.ConfigError, r"images\[0\] = 'a\\x00b': is no image that can be read"),
    (["\ud800.png"], config.ConfigError, r"images\[0\] = '\\ud800.png': is no image that can be read"),
]
NO_TEXTS = [
    (None, TypeError, "texts: is of type NoneType; expected a list"),
    ("a fox", TypeError, "texts: is one str; expected a list"),
    ({"a fox"}, TypeError, "texts: is of type set; expected a list"),
    (np.float32(3), TypeError, "texts: is of type float32; expected a list"),
    (["a fox", None], TypeError, r"texts\[1\]: is of type NoneType; expected a str"),
    ([["a fox"]], TypeError, r"texts\[0\]: is of type list; expected a str"),
    ([b"a fox"], TypeError, r"texts\[0\]: is of type bytes; expected a str"),
    ([float("nan")], TypeError, r"texts\[0\]: is of type float; expected a str"),
    (np.array([1.0]), TypeError, r"texts\[0\]: is of type float64; expected a str"),
    (["secret \ud83d"], ValueError, r"texts\[0\]: has a lone surrogate at position 7, which is no character"),
]


@pytest.mark.parametrize(("images", "error", "said"), NO_IMAGES, ids=[said[:60] for _, _, said in NO_IMAGES])
def test_what_is_no_image_is_refused(loaded, images, error, said):
    with pytest.raises(error, match=f"^{said}[^\n]*$") as raised:
        loaded.encode_image(images)
    assert type(raised.value) is error


@pytest.mark.parametrize(("texts", "error", "said"), NO_TEXTS, ids=[said[:60] for _, _, said in NO_TEXTS])
def test_what_is_no_text_is_refused_without_showing_it(loaded, texts, error, said):
    with pytest.raises(error, match=f"^{said}[^\n]*$") as raised:
        loaded.encode_text(texts)
    assert "secret" not in str(raised.value)


def test_what_is_an_image_or_a_text_is_taken(loaded, tmp_path):
    image = Image.new("RGB", (5, 4), "white")
    image.save(tmp_path / "a.png")
    gray, wide = Image.new("L", (5, 4), 255), Image.fromarray(np.full((4, 5), 65535, np.uint16))
    white = np.full((4, 5, 3), 255, np.uint8)
    found = loaded.encode_image([image, str(tmp_path / "a.png"), tmp_path / "a.png", gray, wide, white, np.asfortranarray(white)])
    assert found.shape == (7, 8)
    np.testing.assert_allclose(found, np.broadcast_to(found[0], found.shape), atol=1e-6)
    np.testing.assert_allclose(loaded.encode_image(np.stack([white] * 2)), found[:2], atol=1e-6)
    texts = ["a fox", "", "🦊 \U0001f9d1\u200d\U0001f680"]
    for given in (texts, tuple(texts), np.array(texts), iter(texts)):
        np.testing.assert_array_equal(loaded.encode_text(given), loaded.encode_text(texts))
    for empty in (loaded.encode_image([]), loaded.encode_text([])):
        assert (empty.shape, empty.dtype) == ((0, 8), np.float32)


def test_dtype_of_the_arithmetic(workdir, loaded):
    half, full = (clipjax.load(workdir, dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert [run.run.model.dtype for run in (half, full)] == ["bfloat16", "float32"]
    seen = [run.encode_text(WORDS) for run in (half, full)]
    assert all(z.dtype == np.float32 for z in seen)
    assert 1e-6 < np.abs(seen[0] - seen[1]).max() < 0.05
    for wrong in ("float16", np.float32):
        with pytest.raises(config.ConfigError, match=r"dtype = .*bfloat16"):
            clipjax.load(workdir, dtype=wrong)


def test_loading_says_nothing(workdir):
    """Neither Orbax's advice nor libtpu's search for a TPU."""
    code = f"import clipjax; print(clipjax.load({str(workdir)!r}).encode_text(['a fox']).shape)"
    clean = {name: value for name, value in os.environ.items() if name not in environment.COMPILE_ONLY}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("(1, 8)\n", "")
