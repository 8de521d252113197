"""Prepared TensorFlow Datasets as sources, without TensorFlow: ArrayRecord files through `as_data_source`.

Records are parsed here and not by tfds, which would decode every image even where only the captions are needed.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.decode import DeserializeMethod
from tensorflow_datasets.proto import tf_example_pb2

from clipjax import config
from clipjax.config import ConfigError
from clipjax.data.captions import kept
from clipjax.data.formats import tfrecord
from clipjax.data.source import Record, Source, bucket
from clipjax.data.storage.remote import FEATURES, is_prepared, local_copy
from clipjax.files import as_path, reach

RAGGED = "ragged_flat_values"  # what tfds adds to the name of a feature of several values in several rows
TOGETHER = 64  # records that are read at a time where all are
KEYS = ("key", "file_name", "filename", "image_id", "id", "url")  # text features that name an example and are no caption


def data_dir() -> Path:
    """The folder of tfds's datasets, local or on gs:// or s3://: TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Raises ConfigError for a store that is not known, or whose extra is not installed."""
    try:
        return as_path(os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))
    except ConfigError as error:
        raise ConfigError(f"TFDS_DATA_DIR = {error}") from error


def open_emoji(data: config.Data) -> "Tfds":
    """The dataset of clipjax.data.sets.emoji. It is built if it does not exist."""
    from clipjax.data.sets import emoji

    folder = data_dir() / "emoji" / emoji.VERSION
    if is_prepared(folder):
        emoji.warn_if_outdated(folder)
    else:
        emoji.prepare_emoji(data_dir())
    return Tfds(data, folder)


def _prepared(dataset: str = "*") -> dict[tuple[str, ...], Path]:
    """The folder of every prepared dataset, or of those called `dataset`, by (name, version) or (name, config, version)."""
    root = data_dir()
    files = [*root.glob(f"{dataset}/*/{FEATURES}"), *root.glob(f"{dataset}/*/*/{FEATURES}")]
    return {f.parent.relative_to(root).parts: f.parent for f in files if not f.parent.name.startswith("incomplete.")}


def find_dataset(spec: str, name: str) -> Path:
    """The folder of NAME[/CONFIG][:VERSION] (`1.*` matches): of the newest version, if several match.

    Raises ConfigError if it has not been prepared, or if it has several configs and none is named."""
    match = re.fullmatch(r"(\w+)(?:/([\w.+-]+))?(?::([\w.*]+))?", name)
    if not match:
        raise ConfigError(f"data.spec = {spec!r}: must be tfds:NAME[/CONFIG][:VERSION]")
    dataset, wanted_config, wanted_version = match.groups()
    reach(data_dir(), data_dir().exists)
    folders = {parts[1:]: folder for parts, folder in _prepared(dataset).items()}
    found = {
        parts: folder
        for parts, folder in folders.items()
        if wanted_config in (None, *parts[:-1]) and fnmatch(parts[-1], wanted_version or "*")
    }
    if not found:
        known = [f"{'/'.join((dataset, *parts[:-1]))}:{parts[-1]}" for parts in sorted(folders)]
        known = known or sorted({parts[0] for parts in _prepared()})
        remedy = f"prepare it, or set TFDS_DATA_DIR. {how_to_build(dataset)}"
        raise ConfigError(
            f"data.spec = {spec!r}: not among the datasets in {data_dir()} ({', '.join(known) or 'none'}); {remedy}"
        )
    if len(configs := sorted({parts[:-1] for parts in found})) > 1:
        raise ConfigError(f"data.spec = {spec!r}: name one of its configs: {', '.join('/'.join(parts) for parts in configs)}")
    return found[max(found, key=lambda parts: [int(n) if n.isdigit() else -1 for n in parts[-1].split(".")])]


def how_to_build(dataset: str) -> str:
    """How to prepare a dataset of tfds: that takes TensorFlow, which clipjax does without, but for its own."""
    if dataset == "emoji_twitter":
        return "Build it: clipjax data prepare emoji --style twitter"
    packages = "tensorflow tensorflow-datasets apache-beam mlcroissant importlib_resources"  # `tfds` imports all of these
    build = f"~/tfds/bin/tfds build {dataset} --file_format=array_record"
    return f"That takes an environment of its own: python3 -m venv ~/tfds && ~/tfds/bin/pip install {packages} && {build}"


def _leaves(feature: Any, path: str = "", many: bool = False) -> Iterator[tuple[str, Any, bool]]:
    """Every feature that holds values: its path in a record, the feature, and whether an example may hold several values."""
    if isinstance(feature, tfds.features.FeaturesDict):
        for name, child in sorted(feature.items()):
            yield from _leaves(child, f"{path}/{name}" if path else name, many)
    elif isinstance(feature, tfds.features.Sequence):
        yield from _leaves(feature.feature, path, True)
    else:
        yield path, feature, many


class Tfds(Source):
    """One split of a prepared dataset with an image and a text or a label.

    Image: `data.image_field`, or the only one. Label: `data.label_field`, or the only one; of a sequence of labels an example has
    several. Captions: `data.text_field`, else `caption`, else the only text that is not a file's name or a key, else the class
    names of the only label. A field is named by its path, as `captions/text`, and one of several captions by its place, as
    `captions.7`, counted from 0."""

    def __init__(self, data: config.Data, folder: Path) -> None:
        super().__init__()
        self.name, self.folder = f"{data.spec}/{data.split}", folder
        info = tfds.builder_from_directory(folder).info
        leaves = {path: (feature, many) for path, feature, many in _leaves(info.features)}
        self.fields = {path: f"{'several ' * many}{type(f).__name__} {f.shape}" for path, (f, many) in leaves.items()}
        kinds, masks = tfds.features.Image, tfds.features.LabeledImage  # the second derives from the first
        images = [p for p, (f, many) in leaves.items() if isinstance(f, kinds) and not isinstance(f, masks) and not many]
        texts = [p for p, (f, _) in leaves.items() if isinstance(f, tfds.features.Text)]
        labels = [p for p, (f, _) in leaves.items() if isinstance(f, tfds.features.ClassLabel)]

        self._image = self._field("image_field", data.image_field, [images])
        chosen = self._field("label_field", data.label_field, [labels]) if data.label_field else None
        classes = [chosen] if chosen else labels
        captions = [[p for p in texts if p == "caption"], [p for p in texts if p.split("/")[-1] not in KEYS], classes]
        of, _, place = (data.text_field or "").rpartition(".")
        self._place = int(place) if place.isdecimal() and of in texts and leaves[of][1] else None
        self._text = self._field("text_field", data.text_field if self._place is None else of, captions, texts + labels)
        single = [p for p in labels if not leaves[p][1]]
        likely = [self._text] if self._text in labels else single if len(single) == 1 else labels
        self._label = chosen or (likely[0] if len(likely) == 1 else None)
        self.multilabel = self._label is not None and leaves[self._label][1]

        def names_of(path: str | None) -> tuple[str, ...] | None:
            return tuple(name.replace("_", " ") for name in leaves[path][0].names) if path in labels else None

        self.classnames = names_of(self._label)
        self._label_captions = names_of(self._text)  # None: captions are texts
        self._key = next((p for k in KEYS for p in texts if p.split("/")[-1] == k and not leaves[p][1]), None)
        numbers = [p for p, (f, many) in leaves.items() if not many and f.shape == () and np.dtype(f.np_dtype).kind in "fiu"]
        self._number = data.filter.number
        if self._number not in (None, *numbers):
            remedy = f"is no number of {self.name}; there are {', '.join(numbers) or 'none'}"
            raise ConfigError(f"data.filter.number = {self._number!r}: {remedy}")
        asked = [path for path in (self._text, self._label, self._key, self._number) if path]
        self._text_features = frozenset(name.encode() for path in asked for name in (path, f"{path}/{RAGGED}"))
        self.version = f"{info.version} {hashlib.sha256((folder / FEATURES).read_bytes()).hexdigest()[:16]}"
        self._records = self._open(data, info)
        self._split = data.split

    def _field(self, name: str, chosen: str | None, defaults: list[list[str]], known: list[str] | None = None) -> str:
        known = [p for default in defaults for p in default] if known is None else known
        if chosen is not None:
            paths = [p for p in known if p == chosen] or [p for p in known if p.startswith(f"{chosen}/")]
        else:
            paths = next((default for default in defaults if default), [])
        if len(paths) == 1:
            return paths[0]
        kind = {"image_field": "image", "label_field": "label"}.get(name, "text or label")
        choices = ", ".join(f"{p} ({self.fields[p]})" for p in known) or f"none; its fields are {', '.join(self.fields)}"
        raise ConfigError(f"data.{name} = {chosen!r}: choose one {kind} field of {self.name}; there are {choices}")

    def _open(self, data: config.Data, info: Any) -> Any:
        if data.split.partition("[")[0] not in info.splits:
            raise ConfigError(f"data.split = {data.split!r}: {data.spec} has {', '.join(info.splits)}")
        formats = sorted(f.value for f in info.available_file_formats())
        if "array_record" not in formats:
            what = f"is stored as {', '.join(formats)}, which can't be read at random: prepare it again"
            raise ConfigError(f"data.spec = {data.spec!r}: {what}. {how_to_build(info.name)}")
        builder = tfds.builder_from_directory(self.folder, file_format="array_record")
        split = data.split.partition("[")[0]
        local = local_copy(self.folder, split, builder.info.splits[split].filenames)
        builder = tfds.builder_from_directory(local, file_format="array_record")
        try:
            raw = DeserializeMethod.RAW_BYTES
            return builder.as_data_source(data.split, deserialize_method=raw)  # pyright: ignore[reportCallIssue]  (decorated)
        except ValueError as e:  # of a slice such as train[:x]
            raise ConfigError(f"data.split = {data.split!r}: {e}") from e

    def __len__(self) -> int:
        return len(self._records)

    def _record(self, i: int) -> Record:
        example = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]  (protobuf makes it at import)
        return self._parsed(i, example.FromString(self._records[i]).features.feature)

    def text(self, i: int) -> Record:
        return self._text_of(i, lambda: self._records[i])

    def texts(self) -> Iterator[Record]:
        """Many records at a time are read in less time than one by one."""
        for start in range(0, len(self), TOGETHER):
            numbers = range(start, min(start + TOGETHER, len(self)))
            try:
                records = self._records.__getitems__(numbers)
            except Exception:  # one of them can't be read: say which
                yield from map(self.text, numbers)
                continue
            for i, record in zip(numbers, records, strict=True):
                yield self._text_of(i, lambda record=record: record)

    def _text_of(self, i: int, read: Callable[[], bytes]) -> Record:
        return self.guarded(lambda: self._parsed(i, tfrecord.features(read(), self._text_features)), f"number {i}")

    def _parsed(self, i: int, features: Any) -> Record:
        def values(path: str, kind: str) -> list:
            path = path if path in features else f"{path}/{RAGGED}"
            return list(getattr(features[path], kind).value) if path in features else []

        if self._label_captions is not None:
            captions = tuple(self._label_captions[n] for n in values(self._text, "int64_list") if n >= 0)
        else:
            texts = values(self._text, "bytes_list")
            captions = kept(text.decode() for text in (texts if self._place is None else texts[self._place :][:1]))
        found = [n for n in values(self._label, "int64_list") if n >= 0] if self._label else []
        label, labels = (-1, tuple(sorted(set(found)))) if self.multilabel else (next(iter(found), -1), ())
        key = values(self._key, "bytes_list")[0].decode() if self._key else f"{self._split}-{i}"
        image = values(self._image, "bytes_list") or [b""]
        number = (values(self._number, "float_list") or values(self._number, "int64_list")) if self._number else []
        return Record(image[0], captions, key, label, number=float(number[0]) if number else None, labels=labels)

    def buckets(self) -> np.ndarray:
        """Reads nothing where the records have no keys of their own."""
        if self._key:
            return super().buckets()
        return np.fromiter((bucket(f"{self._split}-{i}") for i in range(len(self))), np.uint8, len(self))

    def captions(self, texts: Iterable[Record] | None = None) -> Iterator[str]:
        """All captions. Where they are class names, each name once: the examples add no other text."""
        return super().captions(texts) if self._label_captions is None else iter(self._label_captions)
