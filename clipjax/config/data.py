"""The input's part of a configuration: dataset, augmentation, workers and tokenizer."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from clipjax.config.augment import Augment, TextAugment, View
from clipjax.config.fields import COUNT, POSITIVE, SHARE, TAGGED, Strict, free, require

KINDS = {  # of SPECs, with the form of each
    "emoji": "emoji",
    "tfds": "tfds:NAME[/CONFIG][:VERSION]",
    "wds": "wds:SHARDS",
    "parquet": "parquet:FILES",
    "csv": "csv:FILES",
    "tsv": "tsv:FILES",
    "karpathy": "karpathy:FILE.json[::IMAGES]",
    "folder": "folder:DIR",
}
ENDINGS = {".tsv": "tsv", ".csv": "csv", ".parquet": "parquet", ".tar": "wds"}  # of files, and the kinds that read them


def check_spec(spec: str, name: str) -> None:
    """Raises ConfigError for a text that names no dataset. `name`: the field that holds it."""
    kind, _, rest = spec.partition(":")
    remedy = f"must be {', '.join(list(KINDS.values())[:-1])} or {KINDS['folder']}"
    likely = next((kind for ending, kind in ENDINGS.items() if spec.endswith(ending)), None)
    remedy += f"; for this file {likely}:{spec}" if likely else ""
    require(spec == "emoji" or (kind in KINDS and kind != "emoji" and bool(rest)), name, spec, remedy)


def has_splits(spec: str, split: str) -> bool:
    """Whether `split` tells examples of this dataset from others: tars and tables are whole, but for a share as `train#0-95`."""
    return "#" in split or spec.partition(":")[0] not in ("wds", "csv", "tsv")


def dataset_name(spec: str, split: str) -> str:
    """What a dataset is called in messages and results: SPEC/SPLIT, or the SPEC alone where there are no splits."""
    return f"{spec}/{split}" if has_splits(spec, split) else spec


@dataclass(frozen=True, kw_only=True)
class Filter(Strict, prefix="data.filter"):
    """Which examples a training run leaves out. Others take their places, and they are counted apart from unreadable ones."""

    min_side: int = 0  # pixels that the shorter side of an image must have
    max_aspect: float | None = None  # largest ratio of the longer side to the shorter one
    min_characters: int = 0  # characters that a caption must have; an example without such a caption is left out
    max_characters: int | None = None  # and may have
    number: str | None = None  # the field of a number, as `json.similarity`, that must be at least `at_least`
    at_least: float | None = None  # what that number must be

    def __post_init__(self) -> None:
        for name in ("min_side", "min_characters"):
            require(getattr(self, name) >= 0, f"data.filter.{name}", getattr(self, name), "must not be negative")
        remedy = "must be at least 1, the ratio of a square"
        require(self.max_aspect is None or self.max_aspect >= 1, "data.filter.max_aspect", self.max_aspect, remedy)
        most, least = self.max_characters, max(self.min_characters, 1)
        require(most is None or most >= least, "data.filter.max_characters", most, f"must be at least {least}")
        remedy = "goes with data.filter.number: give both or neither"
        require((self.number is None) == (self.at_least is None), "data.filter.at_least", self.at_least, remedy)


@dataclass(frozen=True, kw_only=True)
class Part(Strict, prefix="data.sources"):
    """One of several datasets that are mixed in every batch. A field that is None is that of `data`."""

    spec: str  # as `data.spec`
    split: str = "train"  # as `data.split`
    image_field: str | None = None  # as `data.image_field`
    text_field: str | None = None  # as `data.text_field`
    label_field: str | None = None  # as `data.label_field`
    weight: float | None = None  # its share of every batch is in proportion to this
    repeat: float | None = None  # or to this times its number of examples; 1 where no part has either
    augment: Augment | None = None  # None: `data.augment`
    filter: Filter | None = None  # None: `data.filter`
    index: str | None = None  # as `data.index`

    def __post_init__(self) -> None:
        check_spec(self.spec, "data.sources.spec")
        for name in ("weight", "repeat"):
            POSITIVE.require(f"data.sources.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Data(Strict, prefix="data"):
    """Where images and captions come from, and how they are read."""

    # `emoji`, `tfds:NAME[/CONFIG][:VERSION]`, `wds:SHARDS`, `parquet:FILES`, `csv:FILES`, `tsv:FILES`, `folder:DIR` or
    # `karpathy:FILE.json[::IMAGES]`: on disks, gs://, s3://, https:// or hf://; several, but of the last, joined by `::`. Needed,
    # unless `sources` are given.
    spec: str = ""
    split: str = "train"  # part of the dataset, where it has parts; `train#0-95`: its examples with crc32(key) mod 100 in [0, 95)
    sources: tuple[Part, ...] = ()  # several datasets that are mixed, with exact counts in every batch
    # Name of the image feature, column or suffix, or a path, as `image.bytes`; None: the only one, `filepath` of a table.
    image_field: str | None = None
    # Name of the caption feature, column or suffix, or a path, as `json.caption`; or several with probabilities, as
    # `txt=0.7,json.alt=0.3`. None: `caption`, the only text feature, or the class names of the only label; `title` of a table.
    text_field: str | None = None
    label_field: str | None = None  # name of the class label, or a path; None: the only label feature, `cls` of a tar
    # 1: at each visit one of the captions at random. K: the main caption and K - 1 random others; if there are fewer, some twice.
    captions_per_image: int = 1
    # The places, from 0, of an example's captions that are used at every visit, in this order, in place of a draw: a column of
    # several languages, for example. An example that has not all of them is bad, and another replaces it. (): a draw.
    captions: tuple[int, ...] = ()
    text_augment: TextAugment = TextAugment()  # changed copies of the first caption, behind the captions
    # `caption`: examples with equal main captions share an id; case, punctuation and white space do not count. Pairs that share
    # an id are no negatives of each other.
    ids: Literal["caption"] | None = None
    teacher: str | None = None  # an .npz that `clipjax embed` wrote of these examples, for Distillation and Preserve
    # Classes of each example: an .npz that `clipjax cluster` wrote, or any with `key` str [n] and `label` int [n, l],
    # where -1 is none; `own`: the dataset's.
    labels: str | None = None
    # An .npz that `clipjax embed` wrote of these examples, with the weights of the start. It stands for the tower with
    # `unlock = 0`, which then does not run; of the image tower, no image is read.
    embeddings: str | None = None
    # `random`: all examples of an epoch are shuffled. `windows`: for tars and parquet that are large or remote, which are then
    # read in large pieces: each of `lanes` parts of an epoch gives its share of every batch and shuffles `window` examples.
    order: Literal["random", "windows"] = "random"
    lanes: int = 64  # of `windows`: at least as many as hosts, better a multiple of them
    window: int = 2048  # of `windows`: all hosts together hold lanes x window examples, as they are stored
    index: str | None = free(None)  # folder of the index of tars; None: beside them, or in the cache of the user
    filter: Filter = Filter()  # which examples training leaves out
    # To a square: `squash` resizes both sides, `crop` resizes the shorter side and crops the centre.
    resize: Literal["squash", "crop"] = "squash"
    # `fast`: of training images, by SIMD (the extra `fast`). A sixth of the values differ from Pillow's, by 1 to 4 of 255.
    resizer: Literal["pillow", "fast"] = "pillow"
    max_pixels: int = 178_956_970  # a larger image is unreadable: decoding it takes too much memory
    augment: Augment = Augment()  # random changes of training images
    views: tuple[View, ...] = ()  # several views of an image, each with its own changes, in place of `augment`; terms name places
    workers: int = free(4)  # number of threads or processes on each host that read, decode and augment
    # `processes` are faster if Python takes more of the time than decoding.
    worker_kind: Literal["threads", "processes"] = free("threads")
    prefetch_bytes: int = free(2 * 2**30)  # of examples that lie ready ahead of the step, on each host; 16 batches at most
    # A run ends if more than this share of the last 10,000 examples is bad: unreadable, or without an image or a caption.
    max_bad: float = free(0.1)

    def __post_init__(self) -> None:
        if self.sources:
            remedy = "leave it out: data.sources name the datasets"
            for name in ("spec", "image_field", "text_field", "label_field", "index"):
                require(not getattr(self, name), f"data.{name}", getattr(self, name), remedy)
            for name in ("weight", "repeat"):
                given = [getattr(part, name) is not None for part in self.sources]
                require(all(given) or not any(given), f"data.sources.{name}", None, "must be given for all sources, or for none")
            twice = self.sources[0].weight is not None and self.sources[0].repeat is not None
            require(not twice, "data.sources.repeat", self.sources[0].repeat, "goes without weight: give one of the two")
            remedy = "several datasets number their classes each in its own way: give a file, with the keys of all"
            require(self.labels != "own", "data.labels", self.labels, remedy)
        else:
            check_spec(self.spec, "data.spec")
        for name in ("captions_per_image", "workers", "lanes", "window", "max_pixels", "prefetch_bytes"):
            COUNT.require(f"data.{name}", getattr(self, name))
        self._check_several()
        remedy = "each process would fetch every chunk that windows are made of: use threads, or data.order = 'random'"
        fits = self.order == "random" or self.worker_kind == "threads"
        require(fits, "data.worker_kind", self.worker_kind, remedy)
        SHARE.require("data.max_bad", self.max_bad)

    def _check_several(self) -> None:
        """Raises ConfigError for captions in impossible places, or next to a draw, and for an augmentation next to views."""
        places = self.captions
        possible = min(places, default=0) >= 0 and len(set(places)) == len(places)
        require(possible, "data.captions", places, "must be different places, counted from 0")
        remedy = "leave it out: data.captions say which captions are used"
        require(not places or self.captions_per_image == 1, "data.captions_per_image", self.captions_per_image, remedy)
        remedy = "must begin with 0, the main caption, whose vectors data.teacher has"
        require(not places or places[0] == 0 or self.teacher is None, "data.captions", places, remedy)
        if self.views:
            remedy = "leave it out: each of data.views has its own"
            require(self.augment == Augment(), "data.augment", self.augment, remedy)
            for part in self.sources:
                require(part.augment is None, "data.sources.augment", part.augment, remedy)

    @property
    def texts_per_image(self) -> int:
        """The texts of an example in a batch: its captions, and the changed copies behind them."""
        return (len(self.captions) or self.captions_per_image) + self.text_augment.count

    @property
    def views_per_image(self) -> int:
        """The views of an image in a batch."""
        return len(self.views) or 1

    @property
    def parts(self) -> tuple["Data", ...]:
        """One of a single dataset for each of the sources; this one where there are none."""
        if not self.sources:
            return (self,)
        return tuple(self._part(part) for part in self.sources)

    @property
    def name(self) -> str:
        """As `dataset_name`; of a mixture, the names of its parts."""
        return " + ".join(dataset_name(part.spec, part.split) for part in self.parts)

    def _part(self, part: Part) -> "Data":
        names = ("spec", "split", "image_field", "text_field", "label_field", "index")
        own = {name: getattr(part, name) for name in names}
        augment, wanted = part.augment or self.augment, part.filter or self.filter
        return dataclasses.replace(self, sources=(), augment=augment, filter=wanted, **own)


# What is done to a text before it is tokenized. `web`: HTML entities, control characters, curly quotes, full width, white space.
# `canonicalize`: `web`, then SigLIP's, without punctuation and in lower case. Without `web`, `siglip`: no punctuation, lower
# case, as transformers' tokenizer of SigLIP; `lower`: lower case alone, as that of SigLIP 2.
Clean = Literal["none", "web", "canonicalize", "siglip", "lower"]


@dataclass(frozen=True, kw_only=True)
class BPE(Strict, prefix="tokenizer"):
    """A byte-level BPE of at most model.text.vocab_size tokens, trained on the run's own captions."""

    kind: Literal["bpe"] = "bpe"
    lowercase: bool = True  # captions are changed to lower case
    clean: Clean = "none"  # `web`: HTML entities, control characters, quotes; `canonicalize`: SigLIP's, no punctuation either


@dataclass(frozen=True, kw_only=True)
class TokenizerFile(Strict, prefix="tokenizer"):
    """A tokenizer.json of Hugging Face tokenizers."""

    path: str  # the tokenizer.json
    clean: Clean = "none"  # `web`: HTML entities, control characters, quotes; `canonicalize`: SigLIP's, no punctuation either
    kind: Literal["file"] = "file"


Tokenizer = Annotated[BPE | TokenizerFile, TAGGED]
