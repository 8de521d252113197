import dataclasses
import gc
import logging
import pickle
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from clipjax import config
from clipjax.config import ConfigError
from clipjax.data.examples import TRIES, TrainingExample
from clipjax.data.faults import BAD_IMAGE, FAULTS, NO_CAPTION, NO_IMAGE, UNREAD, shown
from clipjax.data.formats import tfds_source
from clipjax.data.ordering.order import Random
from clipjax.data.ordering.readers import Direct
from clipjax.data.sources import open_source
from clipjax.data.tokenizer import Tokenizer
from clipjax.data.vectors import Vectors
from clipjax.status import CertainFailure
from tests.data.conftest import write_tsv

FEATURES = tfds.features


class Toy(tfds.core.GeneratorBasedBuilder):
    """Ten images in one split and three in another, with the features that a test asks for."""

    VERSION = tfds.core.Version("1.2.0")
    url_infos = MappingProxyType({})  # see clipjax.data.sets.emoji

    def __init__(self, *, features, **kwargs):
        self.extra = features
        super().__init__(**kwargs)

    def _info(self):
        features = {"image": FEATURES.Image(shape=(None, None, 3)), **{name: f for name, (f, _) in self.extra.items()}}
        return tfds.core.DatasetInfo(builder=self, features=FEATURES.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10), "small": self._generate_examples(3)}

    def _generate_examples(self, n):
        for i in range(n):
            image = Image.new("RGB", (8 + i, 6), (20 * i, 0, 0))
            yield i, {"image": image, **{name: make(i) for name, (_, make) in self.extra.items()}}


@pytest.fixture
def toy(tmp_path, monkeypatch, capsys):
    """Builds Toy with the given features and opens it with the given fields of config.Data."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    tfds.disable_progress_bar()

    def make(features, /, spec="tfds:toy", builder=None, **fields):
        form = {"file_format": "array_record"} | (builder or {})
        Toy(features=features, data_dir=tmp_path, **form).download_and_prepare(download_dir=tmp_path / "downloads")
        return open_source(config.Data(spec=spec, **fields))

    return make


TEXT = (FEATURES.Text(), lambda i: f"image {i}")
LABEL = (FEATURES.ClassLabel(names=["tabby_cat", "dog"]), lambda i: i % 2)


def by_red(source):
    """Captions by what the image shows: tfds stores examples in an order of its own."""
    return {int(np.asarray(x.image)[0, 0, 0]) // 20: x.record.captions for x in shown(source, range(len(source)))}


def test_caption(toy):
    source = toy({"caption": TEXT, "label": LABEL, "note": TEXT})
    assert len(source) == 10
    assert by_red(source) == {i: (f"image {i}",) for i in range(10)}
    assert sorted(source.captions()) == [f"image {i}" for i in range(10)]
    assert source.classnames == ("tabby cat", "dog")
    assert all(source.record(i).label == int(source.record(i).captions[0][-1]) % 2 for i in range(10))
    assert next(shown(source, [0])).image.mode == "RGB"
    assert set(source.fields) == {"image", "caption", "label", "note"}


def test_label_only(toy):
    source = toy({"label": LABEL})
    assert by_red(source) == {i: (("tabby cat", "dog")[i % 2],) for i in range(10)}
    assert list(source.captions()) == ["tabby cat", "dog"]  # each name once: a tokenizer needs no more
    assert source.record(0).key == "train-0"


def test_a_label_is_chosen(toy):
    coarse = (FEATURES.ClassLabel(names=["cold", "warm"]), lambda i: i // 5)
    source = toy({"label": LABEL, "coarse_label": coarse}, label_field="coarse_label")
    assert (source.classnames, source.multilabel) == (("cold", "warm"), False)
    assert by_red(source) == {i: (("cold", "warm")[i // 5],) for i in range(10)}
    both = open_source(config.Data(spec="tfds:toy", label_field="label", text_field="coarse_label"))
    assert both.classnames == ("tabby cat", "dog")
    found = {int(np.asarray(x.image)[0, 0, 0]) // 20: x.record for x in shown(both, range(10))}
    assert {i: (r.label, r.captions) for i, r in found.items()} == {i: (i % 2, (("cold", "warm")[i // 5],)) for i in range(10)}
    with pytest.raises(
        ConfigError, match=r"data.label_field = 'fine': choose one label field of tfds:toy/train; there are coarse"
    ):
        open_source(config.Data(spec="tfds:toy", label_field="fine"))


def test_several_labels(toy):
    of = {0: [], 1: [1, 0, 1], 2: [1]}
    source = toy({"labels": (FEATURES.Sequence(LABEL[0]), lambda i: of[i % 3]), "caption": TEXT})
    assert (source.multilabel, source.classnames) == (True, ("tabby cat", "dog"))
    assert {record.captions[0]: (record.label, record.labels) for record in source.texts()} == {
        f"image {i}": (-1, tuple(sorted(set(of[i % 3])))) for i in range(10)
    }


def test_text_that_is_only_a_file_name_is_the_key(toy):
    source = toy({"label": LABEL, "file_name": (FEATURES.Text(), lambda i: f"{i}.jpg")})
    example = source.record(3)
    assert example.captions[0] in ("tabby cat", "dog")
    assert example.key.endswith(".jpg")


def test_several_captions(toy):
    source = toy({"texts": (FEATURES.Sequence(FEATURES.Text()), lambda i: [f"{i}", f"again {i}"])})
    assert by_red(source) == {i: (f"{i}", f"again {i}") for i in range(10)}
    assert len(list(source.captions())) == 20


def test_a_caption_that_shows_nothing_is_none(toy):
    source = toy({"texts": (FEATURES.Sequence(FEATURES.Text()), lambda i: ["\u200b", f"{i}"] if i % 2 else [" ", "\ufeff"])})
    assert sorted(source.captions()) == ["1", "3", "5", "7", "9"]
    assert sum(not source.text(i).captions for i in range(10)) == 5


def test_captions_nested_as_in_coco(toy):
    coco = FEATURES.Sequence({"id": np.int64, "text": FEATURES.Text()})
    features = {
        "captions": (coco, lambda i: [{"id": 0, "text": f"{i}"}, {"id": 1, "text": f"again {i}"}]),
        "image/filename": (FEATURES.Text(), str),
    }
    expected = {i: (f"{i}", f"again {i}") for i in range(10)}
    assert by_red(toy(features)) == expected
    for field in ("captions", "captions/text"):
        assert by_red(open_source(config.Data(spec="tfds:toy", text_field=field))) == expected


def test_sequence_of_sequences(toy):
    """tfds needs TensorFlow to write one, so the record is made here as tfds would: values and row lengths in two features."""
    source = toy({"texts": (FEATURES.Sequence(FEATURES.Text()), lambda i: ["a"])})
    record = tf_example_pb2.Example.FromString(source._records[0])
    texts = record.features.feature.pop("texts").bytes_list.value
    assert texts == [b"a"]
    record.features.feature["texts/ragged_flat_values"].bytes_list.value.extend([b"a", b"b", b"c"])
    record.features.feature["texts/ragged_row_lengths_0"].int64_list.value.extend([2, 1])
    source._records = [record.SerializeToString()]
    assert source.record(0).captions == ("a", "b", "c")


@pytest.mark.parametrize(("place", "expected"), [("1", ("b",)), ("0", ("a",)), ("7", ())])
def test_one_of_several_captions_by_its_place(toy, place, expected):
    several = FEATURES.Sequence(FEATURES.Text())
    source = toy({"captions": (several, lambda i: ["a", "b", "c"]), "note": TEXT}, text_field=f"captions.{place}")
    assert source.record(0).captions == source.text(0).captions == expected


def test_texts_are_records_without_images(toy, monkeypatch):
    """Of every field that is asked for, also of several values; and no image is parsed."""
    several = FEATURES.Sequence({"text": FEATURES.Text(), "score": np.float32})
    fields = {"captions": (several, lambda i: {"text": [f"a {i}", f"b {i}"], "score": [0.0, 1.0]}), "label": LABEL}
    source = toy(fields | {"id": (FEATURES.Text(), lambda i: f"key {i}"), "note": TEXT}, text_field="captions")
    full = [dataclasses.replace(source.record(i), image=b"") for i in range(10)]
    assert sorted(record.captions[1] for record in full) == [f"b {i}" for i in range(10)]
    assert sorted((record.key, record.label) for record in full) == [(f"key {i}", i % 2) for i in range(10)]
    buckets = [zlib.crc32(record.key.encode()) % 100 for record in full]
    monkeypatch.setattr(tfds_source, "tf_example_pb2", None)
    monkeypatch.setattr(tfds_source, "TOGETHER", 4)
    assert [source.text(i) for i in range(10)] == list(source.texts()) == full
    assert source.buckets().tolist() == buckets


def test_a_record_that_is_torn_has_no_text(toy, caplog):
    source = toy({"caption": TEXT})
    records = [source._records[i] for i in range(3)]
    for torn in (records[1][:20], b"", b"\x12\x00", records[1] + b"\n\x00", records[1][:1] + b"\xff" * 12):
        source._records = Records([records[0], torn, records[2]])
        source._warned.clear()
        assert [len(record.captions) for record in source.texts()] == [1, 0, 1]
    assert sum("example number 1 can't be read" in r.getMessage() for r in caplog.records) == 5


def test_a_record_that_the_storage_does_not_give(toy, caplog):
    """The others that are read with it are read one by one."""
    source = toy({"caption": TEXT})
    source._records = Records([source._records[0], OSError("damaged"), source._records[2]])
    assert [len(record.captions) for record in source.texts()] == [1, 0, 1]
    assert "example number 1 can't be read: OSError: damaged" in caplog.text


class Records(list):
    """As ArrayRecord's, with what can't be read."""

    def __getitem__(self, i):
        record = super().__getitem__(i)
        if isinstance(record, Exception):
            raise record
        return record

    def __getitems__(self, numbers):
        return [self[i] for i in numbers]


def test_keys_of_records_without_any_need_no_reading(toy):
    source = toy({"caption": TEXT})
    expected = [zlib.crc32(source.text(i).key.encode()) % 100 for i in range(10)]
    source._records = Records([OSError()] * 10)
    assert source.buckets().tolist() == expected


def test_the_version_says_what_is_stored(toy):
    """The dataset's own, and which features it has."""
    assert toy({"caption": TEXT}).version.startswith("1.2.0 ")


def test_chosen_field(toy):
    toy({"caption": TEXT, "other": (FEATURES.Text(), lambda i: f"other {i}"), "label": LABEL, "second": LABEL})
    assert by_red(open_source(config.Data(spec="tfds:toy", text_field="other")))[7] == ("other 7",)
    source = open_source(config.Data(spec="tfds:toy", text_field="second"))
    assert by_red(source)[7] == ("dog",)
    assert source.classnames == ("tabby cat", "dog")


def test_split_and_slice(toy):
    assert len(toy({"caption": TEXT}, split="small")) == 3
    assert len(open_source(config.Data(spec="tfds:toy", split="train[:4]"))) == 4


def test_newest_version(toy, tmp_path):
    toy({"caption": TEXT})
    for version in ("1.10.0", "1.9.0"):
        (tmp_path / "toy" / "1.2.0").rename(tmp_path / "toy" / version)
        toy({"caption": TEXT})
    folders = [open_source(config.Data(spec=s)).folder.name for s in ("tfds:toy", "tfds:toy:1.2.0", "tfds:toy:1.9.*")]
    assert folders == ["1.10.0", "1.2.0", "1.9.0"]


def test_configs(toy, tmp_path):
    toy({"caption": TEXT})
    for name in ("large", "tiny"):
        (tmp_path / "two" / name).mkdir(parents=True)
        (tmp_path / "two" / name / "1.0.0").symlink_to(tmp_path / "toy" / "1.2.0")
    assert len(open_source(config.Data(spec="tfds:two/tiny"))) == 10
    with pytest.raises(ConfigError, match=r"data.spec = 'tfds:two': name one of its configs: large, tiny"):
        open_source(config.Data(spec="tfds:two"))


def test_can_be_pickled_and_read_by_threads(toy):
    source = toy({"caption": TEXT})
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda i: copy.record(i % 10).captions, range(200)))
    assert seen == [source.record(i % 10).captions for i in range(200)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(spec="tfds:nothing"),
            r"'tfds:nothing': not among the datasets in .* \(toy\); prepare it, .*~/tfds/bin/tfds build nothing",
        ),
        (dict(spec="tfds:toy:9.*"), r"not among the datasets in .* \(toy:1.2.0\)"),
        (dict(spec="tfds:a b"), r"must be tfds:NAME"),
        (dict(text_field="a", split="validation"), r"data.split = 'validation': tfds:toy has train, small"),
        (dict(text_field="a", split="train[:x]"), r"data.split = 'train\[:x\]'"),
        (dict(text_field="words"), r"data.text_field = 'words': choose one text or label field .* a \(Text \(\)\), b \(Text"),
        (dict(text_field=None), r"data.text_field = None: choose one text or label field"),
        (dict(image_field="a"), r"data.image_field = 'a': choose one image field of tfds:toy/train; there are image \(Image"),
    ],
)
def test_missing_datasets_splits_and_fields(toy, fields, message):
    toy({"a": TEXT, "b": TEXT}, text_field="a")
    with pytest.raises(ConfigError, match=message):
        open_source(config.Data(**({"spec": "tfds:toy"} | fields)))


def test_two_images(toy):
    with pytest.raises(ConfigError, match=r"data.image_field = None: choose one image field .* image .*, mask"):
        toy({"caption": TEXT, "mask": (FEATURES.Image(shape=(None, None, 3)), lambda i: Image.new("RGB", (2, 2)))})


def test_a_mask_is_no_image(toy):
    mask = FEATURES.LabeledImage(labels=3, shape=(None, None, 1), encoding_format="png")
    assert len(toy({"caption": TEXT, "mask": (mask, lambda i: Image.new("L", (2, 2)))})) == 10


def test_no_text(toy):
    with pytest.raises(
        ConfigError, match=r"choose one text or label field of tfds:toy/train; there are none; its fields are image, size"
    ):
        toy({"size": (FEATURES.Scalar(np.int64), lambda i: i)})


def test_tfrecord_is_refused(toy, tmp_path):
    """The file itself is not read, so that the test needs no TensorFlow to write one."""
    toy({"caption": TEXT})
    info = tmp_path / "toy" / "1.2.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ConfigError, match=r"stored as tfrecord, which can't be read at random: .*--file_format=array_record"):
        open_source(config.Data(spec="tfds:toy"))


def test_names_include_the_split_if_there_is_one(toy, images_tsv):
    assert toy({"caption": TEXT}, split="train[:4]").name == "tfds:toy/train[:4]"
    for split in ("train", "test"):
        assert open_source(config.Data(spec=f"tsv:{images_tsv}", split=split)).name == f"tsv:{images_tsv}"
    with pytest.raises(ConfigError, match=r"data.split = 'val': tsv:.*pairs.tsv has no splits; leave it out"):
        open_source(config.Data(spec=f"tsv:{images_tsv}", split="val"))


@pytest.mark.parametrize("spec", ["imagenet", "emoji:x", "tfds:", "tsv:", "files:a.tar"])
def test_unknown_spec(spec):
    with pytest.raises(ConfigError, match=rf"data.spec = '{spec}': must be emoji, tfds:NAME"):
        open_source(config.Data(spec=spec))


@pytest.fixture
def damaged(tmp_path, images_tsv):
    """Twelve images; 2 is cut off, 5 is missing and 9 is no image."""
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes((images_tsv.parent / f"{i}.png").read_bytes())
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:500])
    (tmp_path / "5.png").unlink()
    (tmp_path / "9.png").write_text("<html>404</html>")
    path = write_tsv(tmp_path, [(f"{i}.png", f"number {i}") for i in range(12)])
    return config.Data(spec=f"tsv:{path}")


SIZE = 4


def made(source, n, share=None):
    """The example at each place of an epoch's batches of `share`, n in all; by default one batch is all of them."""
    share, tokenizer = share or n, Tokenizer.train(["number"], 265, lowercase=True, length=24)
    make = TrainingExample(source, Random(n, share, 0), Direct(source), tokenizer, config.Data(spec="emoji"), SIZE, None)
    examples = [make(*divmod(i, share), np.random.default_rng(i)) for i in range(n)]
    return [(e, tokenizer.decode(e["text"])) for e in examples]


def bad_ones(examples):
    """The number of each replaced example, and its fault."""
    return {int(e["index"]): FAULTS[e["fault"] - 1] for e, _ in examples if e["replaced"]}


def test_unreadable_images_are_replaced_by_other_examples(damaged, caplog):
    source = open_source(damaged)
    with caplog.at_level(logging.WARNING):
        examples, again = made(source, 12, 4), made(source, 12, 4)
    assert bad_ones(examples) == {2: BAD_IMAGE, 5: UNREAD, 9: BAD_IMAGE}
    for e, caption in examples:  # image and caption still belong together
        assert (e["image"][..., 0] == 4 * int(caption.split()[1])).all()
    assert [caption for _, caption in examples] == [caption for _, caption in again]
    for batch in (examples[:4], examples[4:8], examples[8:]):
        assert len({caption for _, caption in batch}) == 4  # none is its own negative
    messages = [r.getMessage() for r in caplog.records]
    assert (
        len([m for m in messages if "2.png is replaced by another, because it has an image that can't be used: OSError" in m])
        == 1
    )
    assert sorted(m.split()[2] for m in messages if "5.png is" in m or "9.png is" in m) == ["5.png", "9.png"]


def test_a_number_to_filter_by(toy):
    features = {"caption": TEXT, "score": (np.float32, lambda i: i / 4), "votes": (np.int64, lambda i: 3 * i)}
    source = toy(features, filter=config.Filter(number="score", at_least=1.0))
    assert sorted(source.record(i).number for i in range(10)) == [i / 4 for i in range(10)]
    assert source.text(3).number == source.record(3).number
    votes = open_source(config.Data(spec="tfds:toy", filter=config.Filter(number="votes", at_least=1.0)))
    assert sorted(votes.record(i).number for i in range(10)) == [3.0 * i for i in range(10)]
    with pytest.raises(ConfigError, match=r"data.filter.number = 'caption': is no number of .*; there are score, votes$"):
        open_source(config.Data(spec="tfds:toy", filter=config.Filter(number="caption", at_least=1.0)))


def test_examples_without_a_caption_are_replaced_too(toy):
    source = toy({"texts": (FEATURES.Sequence(FEATURES.Text()), lambda i: [] if i == 4 else [f"{i}"])})
    examples = made(source, 10, 5)
    assert list(bad_ones(examples).values()) == [NO_CAPTION]
    assert all(caption == str(e["image"][0, 0, 0] // 20) for e, caption in examples)


def test_examples_without_an_image_and_torn_records_are_replaced_too(toy, caplog):
    source = toy({"caption": TEXT, "label": LABEL})
    bare, torn = (tf_example_pb2.Example.FromString(source._records[i]) for i in (2, 5))
    caption = bare.features.feature["caption"].bytes_list.value[0].decode()
    del bare.features.feature["image"], bare.features.feature["label"]
    source._records = [source._records[i] for i in range(10)]
    source._records[2], source._records[5] = bare.SerializeToString(), torn.SerializeToString()[:-3]
    with caplog.at_level(logging.WARNING):
        examples = made(source, 10, 5) + made(source, 10, 5)
    assert bad_ones(examples) == {2: NO_IMAGE, 5: UNREAD}
    for e, text in examples:
        assert text == f"image {e['image'][0, 0, 0] // 20}"
    messages = sorted(r.getMessage() for r in caplog.records)
    assert len(messages) == 2
    assert "example number 5 is replaced by another, because it can't be read: DecodeError" in messages[0]
    assert "example train-2 is replaced by another, because it has no image" in messages[1]
    assert (source.record(2).captions, source.record(2).label) == ((caption,), -1)  # what is there can be evaluated
    assert source.record(5).captions == ()
    assert len(list(source.captions())) == 9


def test_a_bad_example_keeps_no_exception_in_memory(damaged, monkeypatch):
    """An exception holds its frames, and a frame holds the image that was being read."""
    large = []

    def fail(*_):
        image = np.zeros(10)
        large.append(weakref.ref(image))
        raise OSError("torn")

    source = open_source(damaged)
    monkeypatch.setattr("clipjax.data.images.image.training", fail)
    with pytest.raises(CertainFailure, match=r"\.png and 64 stand-ins are bad \(has an image that can't be used: 65\)"):
        made(source, 12, 4)
    gc.collect()
    assert len(large) == TRIES + 1
    assert not any(ref() for ref in large)


def test_a_file_of_a_store_is_refused_by_name(emoji_dataset):
    data = config.Data(spec="emoji", teacher="s3://bucket/a.npz")
    with pytest.raises(ConfigError, match=r"data.teacher = 's3://bucket/a.npz': must be on this machine"):
        Vectors(str(data.teacher), open_source(data))


def test_nothing_readable_is_an_error(tmp_path):
    path = write_tsv(tmp_path, [("a.png", "a"), ("b.png", "b")])
    with pytest.raises(CertainFailure, match=rf"tsv:.*png and {TRIES} stand-ins are bad \(can't be read: 65\): .* check"):
        made(open_source(config.Data(spec=f"tsv:{path}")), 2)
