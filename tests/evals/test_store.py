import dataclasses
import os

import jax
import numpy as np
import pytest
from PIL import Image

from clipjax import config
from clipjax.data.sources import open_source
from clipjax.evals.embed import by_index
from clipjax.evals.inputs import caption_batches, image_batches, prompt_batches
from clipjax.evals.store import Store, checksum
from clipjax.sharding import over_rows
from tests.evals.tiny import MODEL, TOKENIZER, Counting, mesh_of


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "embeddings")


@pytest.fixture
def data(tsv):
    return config.Data(spec=f"tsv:{tsv}/pairs.tsv", workers=1)


def images_of(encoder, params, data, **more):
    return by_index(encoder, params, image_batches(encoder, open_source(data), data, **more), 10)


def test_vectors_are_found_again_bit_by_bit_by_every_evaluation(store, params, data, caplog):
    first, plain = Counting(store), Counting(None)
    want, has = images_of(plain, params, data)
    got, found = images_of(first, params, data)
    assert first.rows_seen == 12
    again = Counting(store, batch_size=3)  # of another size, and from another process
    z, real = images_of(again, params, data)
    assert again.rows_seen == 0
    for x, y in ((got, want), (found, has), (z, want), (real, has)):
        np.testing.assert_array_equal(x, y)
    assert not has[4]
    assert again.usable == {data.spec: (9, 1)}
    assert caplog.text.count("1 of 10 examples can't be used and are left out") == 3  # told each time
    classes = np.arange(10, dtype=np.int32)
    rows = list(again.stream(params, image_batches(again, open_source(data), data, labels=classes, captioned=False)))
    labels = np.concatenate([rest["label"] for _, rest in rows])
    assert labels[:10].tolist() == [0, 1, 2, 3, -1, 5, 6, 7, 8, 9]
    assert again.rows_seen == 0


def test_texts_are_found_by_their_tokens(store, params):
    encoder = Counting(store)
    one, _ = by_index(encoder, params, caption_batches(encoder, TOKENIZER, ["fox", "hen", "owl"], [2, 0, 1], "x"), 3)
    seen = encoder.rows_seen
    same = prompt_batches(encoder, TOKENIZER, ["fox", "hen", "owl"], ["{c}"])
    other, _ = by_index(encoder, params, caption_batches(encoder, TOKENIZER, ["fox", "hen", "owl"], [0, 1, 2], "x"), 3)
    np.testing.assert_array_equal(one[[2, 0, 1]], other)  # whose they are is not kept
    assert encoder.rows_seen == seen
    (batch,) = encoder.stream(params, same)
    assert batch[1]["label"].tolist() == [0, 1, 2, -1]
    by_index(encoder, params, caption_batches(encoder, TOKENIZER, ["fox", "hen", "elk"], [0, 1, 2], "x"), 3)
    assert encoder.rows_seen > seen


def test_nothing_old_is_used(store, params, data, tsv, tmp_path):
    encoder = Counting(store)
    images_of(encoder, params, data)
    leaves, tree = jax.tree.flatten(params)
    other = jax.tree.unflatten(tree, [leaves[0].at[(0,) * leaves[0].ndim].add(1e-3), *leaves[1:]])
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in tsv.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    same = config.Data(spec=f"tsv:{moved}/pairs.tsv", workers=1)
    images_of(encoder, params, same)
    Image.new("RGB", (8, 8)).save(moved / "3.png")  # under the same key and caption
    for weights, read in ((other, data), (params, dataclasses.replace(data, resize="crop")), (params, same)):
        seen = encoder.rows_seen
        images_of(encoder, weights, read)
        assert encoder.rows_seen == seen + 12
    images_of(rounded := Counting(store, model=dataclasses.replace(MODEL, dtype="bfloat16")), params, data)
    assert rounded.rows_seen == 12


def test_an_evaluation_that_ends_early_leaves_nothing(store, params, data):
    encoder = Counting(store)
    next(stream := encoder.stream(params, image_batches(encoder, open_source(data), data)))
    stream.close()
    assert list(store.folder.iterdir()) == []
    images_of(encoder, params, data)
    (file,) = store.folder.iterdir()
    file.write_bytes(file.read_bytes()[:100])  # damaged: made anew
    seen = encoder.rows_seen
    images_of(encoder, params, data)
    assert encoder.rows_seen == seen + 12


def write(store, name, rows):
    with store.writing(name, {}, rows) as add:
        add({"z": np.ones((rows, 8), np.float32)})


def test_the_oldest_are_dropped_for_room(tmp_path):
    store = Store(tmp_path, 1000)  # rows of 32 bytes, and a header of 128
    for age, name in ((3, "a"), (2, "b")):
        write(store, name, 10)
        (path,) = tmp_path.glob(f"{name}-*")
        os.utime(path, (1e9 - age, 1e9 - age))
    assert store.find("a", {}) is not None  # is now the newest
    write(store, "c", 10)
    assert [store.find(name, {}) is not None for name in "abc"] == [True, False, True]
    write(store, "d", 100)  # is larger than the folder may be
    assert [store.find(name, {}) is not None for name in "acd"] == [True, True, False]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_else_a_folder_holds_is_left_alone(tmp_path, caplog):
    """`--cache DIR` can be any folder, as that of all of a user's files."""
    store, long_ago = Store(tmp_path, 1000), (0, 0)
    killed = store._path("a", {}).with_name(f".{store._path('a', {}).name}.7")
    killed.write_bytes(b"part")
    others = [tmp_path / name for name in (".profile", "thesis.pdf", "vectors.npy", ".git")]
    for path in others[:3]:
        path.write_bytes(b"x" * 2000)
    others[3].mkdir()
    for path in (killed, *others):
        os.utime(path, long_ago)
    write(store, "b", 10)
    assert all(path.exists() for path in others)
    assert not killed.exists()
    store._path("c", {}).touch()  # of a machine that lost its power
    assert store.find("c", {}) is None
    assert "can't be read and is made anew" in caplog.text


def test_a_process_without_rows_finds_that_it_has_none(tmp_path, caplog):
    store = Store(tmp_path)
    write(store, "a", 0)
    assert store.find("a", {})["z"].shape == (0, 8)
    assert not caplog.text
    write(store, "b", 100_000)  # of more bytes than are read at once
    assert isinstance(store.find("b", {}), np.memmap)


def test_the_checksum_is_the_same_on_every_mesh_and_sees_every_bit():
    x = {"w": np.arange(48, dtype=np.float32).reshape(16, 3)}
    mesh = mesh_of("8")
    assert checksum(jax.device_put(x, over_rows(mesh)), mesh) == checksum(jax.device_put(x), mesh_of("1"))
    of = [x, {"w": x["w"].T}, {"w": x["w"][::-1]}, {"v": x["w"]}, {"w": np.nextafter(x["w"], 99)}, {"w": x["w"].astype(int)}]
    assert len({checksum(jax.device_put(tree), mesh_of("1")) for tree in of}) == len(of)
