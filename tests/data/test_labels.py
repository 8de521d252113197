import itertools
import pickle
from contextlib import nullcontext

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipjax import build, config
from clipjax.config import ConfigError, Data, Part
from clipjax.data.pipeline import train_batches
from clipjax.data.sources import open_source
from clipjax.data.vectors import LABELS, Vectors
from tests.data.conftest import IMAGES, write_tsv

CLASSES = np.random.default_rng(0).integers(-1, 9, (IMAGES, 3))
KEYS = [f"{i}.png" for i in range(IMAGES)]


def batches(data, tokenizer, **where):
    with train_batches(open_source(data), tokenizer, data, image_size=16, batch_size=8, seed=0, **where) as stream:
        return list(itertools.islice(stream, 6))


def saved(folder, key=KEYS, **arrays):
    np.savez(folder / "labels.npz", key=key, **arrays)
    return str(folder / "labels.npz")


def test_each_example_has_the_labels_of_its_key(tokenizer, images_tsv, tmp_path):
    order = np.random.default_rng(1).permutation(IMAGES)
    path = saved(tmp_path, [*(KEYS[i] for i in order), "nobody.png"], label=[*CLASSES[order], [5, 5, 5]])
    data = Data(spec=f"tsv:{images_tsv}", labels=path, workers=2)
    full = batches(data, tokenizer)
    for batch in full:
        assert batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["label"], CLASSES[batch["index"]])
    shares = [batches(data, tokenizer, process_index=p, process_count=2) for p in range(2)]
    for batch, *parts in zip(full, *shares, strict=True):
        np.testing.assert_array_equal(np.concatenate([p["label"] for p in parts]), batch["label"])


@pytest.mark.parametrize(
    ("arrays", "message"),
    {
        "another array": (dict(labels=CLASSES), r"must hold arrays label and key; write it with `clipjax cluster EMB\.npz"),
        "no integers": (dict(label=CLASSES / 2), r"must hold label int \[n, f\] and key str \[n\], not label float64 \(41, 3\)"),
        "no label": (dict(label=CLASSES[:, :0]), r"must hold label int \[n, f\]"),
        "one axis": (dict(label=CLASSES[:, 0]), r"must hold label int \[n, f\]"),
        "below -1": (dict(label=CLASSES - 1), r"must hold classes from 0 to 2\^31 - 1, and -1 for none"),
        "above int32": (dict(label=CLASSES + 2**32), r"must hold classes from 0 to 2\^31 - 1"),
        "other data": (
            dict(key=["a.png", *KEYS[1:]], label=CLASSES),
            r"has no row for 1 of the 41 examples of .*, the first with key .0.png.; write it from the same .*`clipjax cluster E",
        ),
    }.values(),
)
def test_a_file_of_something_else_is_refused(images_tsv, tmp_path, arrays, message):
    path = saved(tmp_path, **arrays)
    with pytest.raises(ConfigError, match=r"^data\.labels = '.*labels\.npz': " + message):
        Vectors(path, open_source(Data(spec=f"tsv:{images_tsv}")), use=LABELS)


@pytest.mark.parametrize("count", [8, 9])
def test_labels_are_fewer_than_what_is_learned_of_them(images_tsv, tmp_path, count):
    """Highest is 8: of 8 classes there is no ninth."""
    data = Data(spec=f"tsv:{images_tsv}", labels=saved(tmp_path, label=CLASSES))
    run = config.Run(data=data, objective=(config.Distillation(targets="labels", classes=count),))
    with pytest.raises(ConfigError, match=r"^objective\.0\.classes = 8: .*set it to 9 or more$") if count == 8 else nullcontext():
        build.labels(run, open_source(data))


def test_the_datasets_own_label(tokenizer, images_tsv, tmp_path):
    rows = [(str(images_tsv.parent / key), f"number {i}", ("odd", "even", "")[i % 3]) for i, key in enumerate(KEYS)]
    data = Data(spec=f"tsv:{write_tsv(tmp_path, rows, 'filepath	title	kind')}", label_field="kind", labels="own", workers=1)
    for batch in batches(data, tokenizer):
        np.testing.assert_array_equal(batch["label"][:, 0], np.array([1, 0, -1])[batch["index"] % 3])


def test_the_datasets_own_labels_of_several_classes(images_tsv, tmp_path):
    images = [(images_tsv.parent / key).read_bytes() for key in KEYS[:3]]
    table = pa.table({"image": images, "caption": ["a", "b", "c"], "kinds": pa.array([[2, 0], [], [3]])})
    pq.write_table(table, tmp_path / "a.parquet")
    data = Data(spec=f"parquet:{tmp_path / 'a.parquet'}", label_field="kinds", labels="own")
    found = pickle.loads(pickle.dumps(Vectors("own", open_source(data), use=LABELS)))
    assert [found[i]["label"].tolist() for i in range(3)] == [[0, 2], [-1, -1], [3, -1]]
    assert (found.width, found.numbers, found.highest, 2 in found) == (2, 2, 3, True)


def test_own_labels_that_are_not_there_are_refused(images_tsv):
    with pytest.raises(ConfigError, match=r"^data\.labels = 'own': tsv:.* has no class label; name its field with data\.label_f"):
        Vectors("own", open_source(Data(spec=f"tsv:{images_tsv}")), use=LABELS)
    with pytest.raises(ConfigError, match=r"^data\.labels = 'own': several datasets number their classes each in its own way"):
        Data(sources=(Part(spec="tsv:a.tsv"), Part(spec="tsv:b.tsv")), labels="own")
