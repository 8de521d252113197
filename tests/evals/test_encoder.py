import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.data import bar
from clipjax.evals import encoder as module
from clipjax.evals.embed import by_index
from clipjax.evals.encoder import CachedBatches, Encoder
from clipjax.models import clip
from clipjax.sharding import batch_devices
from tests.evals.tiny import MODEL, image_batches, mesh_of, tokenize


def test_embeds_a_full_source_in_place(encoder, model, params, images):
    index = np.arange(37, dtype=np.int32)
    got = encoder.embed(params, image_batches(images, encoder, index=index))
    devices = batch_devices(encoder.mesh)
    assert got.z.dtype == jnp.float32
    assert got.z.addressable_shards[0].data.shape == (-(-37 // encoder.batch_size), encoder.batch_size // devices, 8)
    z, ids = (np.asarray(x) for x in got.rows())
    np.testing.assert_array_equal(ids, np.pad(index, (0, len(ids) - 37), constant_values=-1))
    np.testing.assert_allclose(z[:37], model.encode_image(jnp.asarray(images)), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(module.to_host(got.z), np.asarray(got.z))


def test_embeds_text(encoder, model, params):
    tokens = tokenize([f"a {'x' * i}" for i in range(encoder.batch_size)])
    batches = CachedBatches(lambda: [{"text": tokens, "index": np.arange(len(tokens), dtype=np.int32)}], 1, "toy", "captions")
    np.testing.assert_allclose(encoder.embed(params, batches).z[0], model.encode_text(jnp.asarray(tokens)), atol=1e-6)


def test_towers_compile_once(params, images):
    encoder = Encoder(MODEL, mesh_of("8"), 16)
    for _ in range(2):
        list(encoder.stream(params, image_batches(images, encoder, index=np.arange(37, dtype=np.int32))))
    assert encoder._towers["image"]._cache_size() == 1


def test_any_number_of_batches_takes_one_small_program(params):
    """300 batches: a program with an argument for each would have 600, and compile for minutes."""
    encoder, n = Encoder(MODEL, mesh_of("8"), 8), 300
    tokens = tokenize(["a fox"] * 8)
    before = encoder._write._cache_size()  # all encoders of a process share it
    read = ({"text": tokens, "index": np.arange(8 * i, 8 * i + 8, dtype=np.int32)} for i in range(n))
    got = encoder.embed(params, CachedBatches(lambda: read, n, "toy", "captions"))
    np.testing.assert_array_equal(got.rows()[1], np.arange(8 * n))
    assert not np.ptp(got.z, axis=0).any()
    assert encoder._write._cache_size() <= before + 1
    one = jax.tree.map(lambda x: x[0], got)
    in_place = encoder._write.lower(got, one, 0).compile().memory_analysis().alias_size_in_bytes
    assert in_place == (got.z.nbytes + got.index.nbytes) / 8


@pytest.mark.parametrize(("wanted", "devices", "got"), [(13, "1", 13), (13, "8", 16), (1, "8", 8), (16, "2x2x2", 16)])
def test_batch_is_rounded_up_to_the_devices(wanted, devices, got):
    encoder = Encoder(MODEL, mesh_of(devices), wanted)
    assert encoder.batch_size == got
    assert [encoder.batch_count(n) for n in (0, 1, got, got + 1)] == [0, 1, 1, 2]


def test_rows_repeat_the_last(monkeypatch):
    encoder = Encoder(MODEL, mesh_of("1"), 4)
    assert [(n.tolist(), real.tolist()) for n, real in encoder.rows(6)] == [
        ([0, 1, 2, 3], [True] * 4),
        ([4, 5, 5, 5], [True, True, False, False]),
    ]
    assert list(encoder.rows(0)) == []
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert [n.tolist() for n, _ in encoder.rows(6)] == [[2, 3], [5, 5]]


@pytest.mark.parametrize(("cache_bytes", "reads"), [(32, 1), (31, 3)])
def test_small_sources_are_read_once_and_large_ones_again(cache_bytes, reads):
    read = []

    def batches():
        read.append(1)
        yield from ({"label": np.full(4, i, np.int32)} for i in range(2))

    again = CachedBatches(batches, 2, "toy", "labels", cache_bytes)
    for _ in range(3):
        assert [b["label"][0] for b in again] == [0, 1]
    assert len(read) == reads


def test_an_iteration_that_was_cut_short_is_not_cached():
    again = CachedBatches(lambda: ({"label": np.full(4, i)} for i in range(3)), 3, "toy", "labels")
    next(iter(again))
    assert [b["label"][0] for b in again] == [0, 1, 2]


def test_progress_names_rate_and_time_left(capsys, monkeypatch):
    monkeypatch.setattr(bar, "DELAY", 0.0)
    list(module.progress(CachedBatches(lambda: [{}] * 3, 3, "emoji/test", "images"), 256))
    line = capsys.readouterr().err
    assert "emoji/test: 100%" in line
    assert "768/768" in line
    assert " images/s]" in line
    assert "\r" not in line  # which a log file shows as one long line
    assert all(text.startswith("emoji/test: ") for text in line.splitlines())


def test_short_work_is_quiet(capsys):
    list(module.progress(CachedBatches(lambda: [{}] * 3, 3, "emoji/test", "images"), 256))
    assert capsys.readouterr().err == ""


def test_features_are_what_the_projection_is_given(params, images):
    plain = Encoder(MODEL, mesh_of("2x2x2"), 13)
    encoder = plain.giving("tower")
    assert plain.giving("embedding") is plain
    assert encoder.usable is plain.usable  # a suite counts the images of both
    z, found = by_index(encoder, params, image_batches(images, encoder, index=np.arange(37, dtype=np.int32)), 37)
    assert z.shape == (37, MODEL.image.width)
    assert found.all()
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-6)
    projected = z @ np.asarray(params["image"]["projection"]["kernel"])
    want = clip.bind(MODEL, params).encode_image(jnp.asarray(images))
    np.testing.assert_allclose(projected / np.linalg.norm(projected, axis=1, keepdims=True), want, atol=1e-5)
