import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest

from clipjax.config import ConfigError, Data
from clipjax.data.pipeline import train_batches
from clipjax.data.sources import open_source
from clipjax.data.vectors import Vectors, memory_mapped
from tests.data.conftest import IMAGES, write_tsv

WIDTH = 5


def vectors(n=IMAGES, seed=0):
    made = np.random.default_rng(seed).normal(size=(2, n, WIDTH)).astype(np.float32)
    return made / np.linalg.norm(made, axis=2, keepdims=True)


@pytest.fixture
def source(images_tsv):
    return open_source(Data(spec=f"tsv:{images_tsv}"))


@pytest.fixture
def write(tmp_path):
    def make(name="teacher.npz", save=np.savez, **arrays):
        save(tmp_path / name, **arrays)
        return str(tmp_path / name)

    return make


@pytest.fixture
def teacher_file(write):
    """A file with the rows in another order than the examples, and a second, later row for one of them."""
    order = np.random.default_rng(1).permutation(IMAGES)
    image, text = vectors()
    keys = [f"{i}.png" for i in order] + [f"{order[0]}.png", "nobody.png"]
    return write(image=[*image[order], image[0], image[1]], text=[*text[order], text[0], text[1]], key=keys)


def batches(source, tokenizer, data, n=6, **where):
    with train_batches(source, tokenizer, data, image_size=16, batch_size=8, seed=0, **where) as stream:
        return list(itertools.islice(stream, n))


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_each_example_has_its_teachers_rows(source, tokenizer, teacher_file, images_tsv, kind):
    image, text = vectors()
    data = Data(spec=f"tsv:{images_tsv}", teacher=teacher_file, workers=2, worker_kind=kind)
    for batch in batches(source, tokenizer, data):
        assert batch["teacher_image"].dtype == batch["teacher_text"].dtype == np.float32
        np.testing.assert_array_equal(batch["teacher_image"], image[batch["index"]])
        np.testing.assert_array_equal(batch["teacher_text"], text[batch["index"]])


def test_a_run_without_a_teacher(source, tokenizer, images_tsv):
    (batch,) = batches(source, tokenizer, Data(spec=f"tsv:{images_tsv}", workers=1), 1)
    assert not {"teacher_image", "teacher_text"} & batch.keys()


def test_processes_share(source, tokenizer, teacher_file, images_tsv):
    data = Data(spec=f"tsv:{images_tsv}", teacher=teacher_file, workers=2)
    straight = batches(source, tokenizer, data)
    shares = [batches(source, tokenizer, data, process_index=p, process_count=2) for p in range(2)]
    for full_batch, *parts in zip(straight, *shares, strict=True):
        for name in full_batch:
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), full_batch[name])


def test_pickled_it_stays_small_and_opens_the_file_again(source, write):
    big = np.zeros((IMAGES, 20_000), np.float32)
    path = write(image=big, text=big + 1, key=[f"{i}.png" for i in range(IMAGES)])
    packed = pickle.dumps(Vectors(path, source))
    assert len(packed) < 2000
    assert pickle.loads(packed)[3]["teacher_text"].tolist() == [1.0] * 20_000


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_what_numpy_reads(write, save):
    arrays = {
        "rows": vectors()[0],
        "turned": np.asfortranarray(vectors()[1]),
        "half": vectors()[0].astype(np.float16),
        "strings": np.array(["a", "ζωή", "🚀"]),
        "none": np.zeros((0, 4), np.float32),
    }
    path = write(save=save, **arrays)
    with np.load(path) as expected:
        for name in arrays:
            got = memory_mapped(Path(path), name)
            assert got.dtype == expected[name].dtype
            np.testing.assert_array_equal(got, expected[name])


def test_an_unreadable_image_needs_no_row(tokenizer, images_tsv, tmp_path, write):
    """`clipjax embed` leaves it out; its replacement has rows of its own."""
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes((images_tsv.parent / f"{i}.png").read_bytes() if i != 6 else b"torn")
    data = Data(spec=f"tsv:{write_tsv(tmp_path, [(f'{i}.png', f'number {i}') for i in range(10)])}", workers=1)
    image, text = vectors(10)
    readable = [i for i in range(10) if i != 6]
    path = write(image=image[readable], text=text[readable], key=[f"{i}.png" for i in readable])
    source = open_source(data)
    for batch in batches(source, tokenizer, Data(spec=data.spec, teacher=path, workers=1), 2):
        shown = np.array([int(tokenizer.decode(row).split()[1]) for row in batch["text"]])
        np.testing.assert_array_equal(batch["teacher_image"], image[shown])
        np.testing.assert_array_equal(batch["teacher_text"], text[shown])
    teacher = Vectors(path, source)
    with pytest.raises(ConfigError, match=r"has no row for number 6 of the examples"):
        teacher[6]


IMAGE, TEXT = vectors()
KEYS = [f"{i}.png" for i in range(IMAGES)]
WANTED = r"must hold image and text float \[n, f\] and key str \[n\], not .*"
BROKEN = {
    "text absent": (dict(image=IMAGE, key=KEYS), r"must hold arrays image, text and key"),
    "other lengths": (dict(image=IMAGE, text=TEXT[1:], key=KEYS), WANTED + r"float32 \(41, 5\), text float32 \(40, 5\)"),
    "fewer keys": (dict(image=IMAGE, text=TEXT, key=KEYS[1:]), WANTED),
    "integers": (dict(image=np.ones((41, 5), int), text=TEXT, key=KEYS), WANTED + "image int64"),
    "numbers as keys": (dict(image=IMAGE, text=TEXT, key=np.arange(41)), WANTED + "key int64"),
    "objects": (dict(image=IMAGE, text=TEXT, key=np.array([*KEYS[1:], None])), r"is not an \.npz .*allow_pickle"),
    "vectors of no example": (
        dict(image=IMAGE[2:], text=TEXT[2:], key=[f"{i + 3}.png" for i in range(39)]),
        r"has no row for 3 of the 41 examples of tsv:.*, the first with key '0\.png'; write it from the same dataset and split",
    ),
}


@pytest.mark.parametrize(("arrays", "message"), BROKEN.values(), ids=BROKEN)
def test_a_file_of_other_data_is_refused(source, tokenizer, images_tsv, write, arrays, message):
    path = write(**arrays)
    with pytest.raises(ConfigError, match=r"^data\.teacher = '.*teacher\.npz': " + message):
        batches(source, tokenizer, Data(spec=f"tsv:{images_tsv}", teacher=path))


def test_a_file_that_is_no_npz(source, tmp_path):
    with pytest.raises(ConfigError, match=r"no\.npz': there is no such file; write it with `clipjax embed RUN --data SPEC"):
        Vectors(str(tmp_path / "no.npz"), source)
    np.save(tmp_path / "one.npy", vectors()[0])
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("one.npy", "text.npz"):
        with pytest.raises(ConfigError, match=r"is not an \.npz that can be read"):
            Vectors(str(tmp_path / name), source)
