"""What a report shows of the runs themselves: it loads one after another and embeds the datasets that the first evaluates on."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import clipjax
from clipjax import config
from clipjax.config import ConfigError
from clipjax.config.data import dataset_name
from clipjax.data.source import Source
from clipjax.data.sources import open_source
from clipjax.evals.embed import MainPairs, Pairs
from clipjax.evals.geometry import GeometryEvaluation
from clipjax.evals.inputs import eval_data
from clipjax.evals.loaded import LoadedRun
from clipjax.evals.store import Store
from clipjax.report import gallery
from clipjax.report.drawing import webp
from clipjax.report.folders import Folder
from clipjax.report.gallery import Search, Writing

PLOT = 1000  # pixels, the width of a picture of the geometry
OF_PAIRS = (config.Retrieval, config.Geometry, config.Captioning)  # evaluations of images with their captions


@dataclass
class SetPictures:
    """Of one dataset. Lists have an entry for each run that could be loaded, in their order."""

    name: str
    runs: list[str] = field(default_factory=list)
    images: list[Search] = field(default_factory=list)  # found for captions
    texts: list[Search] = field(default_factory=list)  # found for images
    writers: list[str] = field(default_factory=list)  # the runs with a decoder
    writings: list[Writing] = field(default_factory=list)
    geometry: list[str] = field(default_factory=list)  # addresses
    notes: list[str] = field(default_factory=list)  # what is missing, and why


@dataclass
class _Seen:
    """What runs gave so far on one dataset."""

    data: config.Data  # as the first run reads it
    clean: config.Clean | None  # what is done to the captions; None: as each run was trained
    source: Source
    pictures: SetPictures
    pairs: list[Pairs] = field(default_factory=list)
    captions: list[dict[int, tuple[str, bool]]] = field(default_factory=list)


def pictures(folders: Sequence[Folder], spec: str | None = None, split: str = "test") -> list[SetPictures]:
    """Of the dataset `spec`; None: of those that the first run evaluates on. A run that can't be loaded is noted.

    Raises ConfigError where the first run can't be loaded, or its dataset not be opened."""
    sets: list[_Seen] = []
    for number, folder in enumerate(folders):
        try:
            model = clipjax.load(str(folder.path))
            kept = folder.path / "embeddings"
            if kept.is_dir():  # a suite keeps what it embeds
                model.encoder.store = Store(kept)
            sets = sets or _open(model, spec, split)
            for seen in sets:
                _look(seen, folder.name, model)
        except ConfigError as error:
            if number == 0:
                raise
            for seen in sets:
                seen.pictures.notes.append(f"{folder.name}: {error}")
    for seen in sets:
        _choose(seen)
    return [seen.pictures for seen in sets]


def _open(model: LoadedRun, spec: str | None, split: str) -> list[_Seen]:
    """The datasets with captions, in which images and texts can be compared."""
    model.run.model.require_towers("image", "text")
    given = [config.Retrieval(data=spec, split=split)] if spec else [e for e in model.run.evals if isinstance(e, OF_PAIRS)]
    found: dict[str, _Seen] = {}
    for wanted in given:
        fields = dict(image_field=wanted.image_field, text_field=wanted.text_field, label_field=wanted.label_field)
        data = eval_data(model.run.data, wanted.spec(model.run.data), wanted.split, **fields)
        name = dataset_name(data.spec, data.split)
        source = open_source(data)
        if name not in found and source.captioned:
            found[name] = _Seen(data, wanted.clean, source, SetPictures(name))
    return list(found.values())


def _look(seen: _Seen, name: str, model: LoadedRun) -> None:
    """Embeds the dataset, read with the fields of the first run: the captions of all are then the same."""
    own = eval_data(model.run.data, seen.data.spec, seen.data.split)
    fields = {name: getattr(seen.data, name) for name in ("image_field", "text_field", "label_field")}
    data = dataclasses.replace(own, **fields)
    tokenizer = model.tokenizer.cleaning(seen.clean)
    pairs = MainPairs(model.encoder, tokenizer, data, seen.source).embed(model.params)
    geometry = GeometryEvaluation.prepare(model.encoder, tokenizer, data, config.Geometry())
    drawn = geometry.run(model.params).draw(f"{name}, step {model.step}, on {seen.pictures.name}")
    if model.run.model.decoder is not None:
        seen.captions.append(gallery.write_captions(model, seen.source, gallery.captioned(seen.source)))
        seen.pictures.writers.append(name)
    seen.pairs.append(pairs)
    seen.pictures.geometry.append(webp(drawn, PLOT))
    seen.pictures.runs.append(name)


def _choose(seen: _Seen) -> None:
    pictures = seen.pictures
    pictures.images = gallery.searches(seen.source, seen.pairs, by_text=True)
    pictures.texts = gallery.searches(seen.source, seen.pairs, by_text=False)
    if seen.captions:
        pictures.writings = gallery.writings(seen.source, seen.captions)
