"""Writes a folder that open_clip or transformers loads unchanged: weights, config, preprocessing and tokenizer."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.numpy

from clipjax.config import Clean, Model, require
from clipjax.data.tokenizer import Tokenizer
from clipjax.export.formats import open_clip, sentence_transformers, transformers
from clipjax.export.formats.table import Precision, to_theirs
from clipjax.models.vit import sincos2d

Format = Literal["open_clip", "transformers"]
Resize = Literal["squash", "crop"]
FORMATS = {"open_clip": open_clip, "transformers": transformers}
CONFIGS = ("open_clip_config.json", "config.json", "preprocessor_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PRODUCER = "clipjax"  # in the weights' metadata, by which a later export knows that it may replace the folder


def export(
    model: Model,
    params: Mapping[str, Any],
    tokenizer: Path,
    resize: Resize,
    out: Path,
    to: Format,
    clean: Clean = "none",
    dtype: Precision = "float32",
) -> None:
    """Writes `out`, completely or not at all. `params`: float32 for any `model.dtype`; they are rounded to `dtype`.
    `tokenizer`: a tokenizer.json; `clean`: what is done to a text before. In the folder it is a part of its tokenizer.json.

    Fixed sine and cosine positions become learned ones with the same values. Raises ConfigError if the format has no such
    tower, if it would find another end token than ours, if a weight is too large for `dtype`, and if `out` is a file or holds
    files and no earlier export. An earlier export is replaced; the other files of its folder, as a model card, stay.
    """
    layout, out = FORMATS[to], out.resolve()
    model.require_towers("image", "text")
    model, params = with_learned_positions(model, params)
    layout.refuse(model)
    loaded = _load_tokenizer(tokenizer, model, clean)
    special = dict(bos=loaded.start_id, eos=loaded.end_id, pad=loaded.pad_id)
    configs = layout.configs(model, special, resize, clean, dtype) | _tokenizer_configs(loaded, special)
    configs |= sentence_transformers.configs(model) if to == "transformers" else {}
    tensors = to_theirs(layout.table(model), params, dtype)
    others = _files_of_others(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as staging:
        fresh = Path(staging) / "fresh"
        fresh.mkdir()
        for path in others:
            shutil.copytree(path, fresh / path.name, symlinks=True) if path.is_dir() else shutil.copy2(path, fresh)
        for name, content in configs.items():
            (fresh / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        loaded.standalone().save(str(fresh / "tokenizer.json"))
        safetensors.numpy.save_file(tensors, fresh / layout.WEIGHTS, {"format": "pt", "producer": PRODUCER})
        _replace(out, fresh)


def _replace(out: Path, fresh: Path) -> None:
    """Puts the folder `fresh` in the place of `out`, whose files are back if that fails."""
    stale = fresh.with_name("stale")
    if out.exists():
        out.rename(stale)
    try:
        fresh.rename(out)
    except BaseException:
        if stale.exists():
            stale.rename(out)
        raise


def with_learned_positions(model: Model, params: Mapping[str, Any]) -> tuple[Model, Mapping[str, Any]]:
    """The same model with its positions as parameters."""
    if model.image.positions == "learned":
        return model, params
    image = dict(params["image"], positions=sincos2d(model.image))
    return replace(model, image=replace(model.image, positions="learned")), dict(params, image=image)


def _load_tokenizer(path: Path, model: Model, clean: Clean) -> Tokenizer:
    """Raises ConfigError if the text tower pools at the end token and that has not the highest id: open_clip and clipjax look for
    the highest id, transformers for the id of the end token.
    """
    loaded = Tokenizer.load(path, model.text.length, clean)
    if model.text.pool == "eot":
        highest = loaded.vocab_size - 1
        remedy = f"its end token must have the highest id, {highest}, and has {loaded.end_id}: open_clip looks for the highest"
        require(loaded.end_id == highest, "tokenizer", str(path), remedy)
    remedy = f"its end token must have the id of model.text.eos_id, {model.text.eos_id}, and has {loaded.end_id}"
    require(model.text.pool != "eos" or loaded.end_id == model.text.eos_id, "tokenizer", str(path), remedy)
    return loaded


def _tokenizer_configs(tokenizer: Tokenizer, special: Mapping[str, int | None]) -> dict[str, Any]:
    """tokenizer_config.json and special_tokens_map.json: transformers, and open_clip through it, need them beside tokenizer.json.

    Of the tokenizer's outputs the models need the ids only: SigLIP attends to padding, and CLIP's causal mask hides it. The
    string of a special token in a caption is text there too, by `split_special_tokens`.
    """
    texts = {f"{role}_token": tokenizer.backend.id_to_token(index) for role, index in special.items() if index is not None}
    config = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=tokenizer.length, model_input_names=["input_ids"])
    config |= dict(padding_side=tokenizer.side, clean_up_tokenization_spaces=False, split_special_tokens=True)
    return {
        "tokenizer_config.json": config | texts,
        "special_tokens_map.json": texts,
    }


def _files_of_others(out: Path) -> list[Path]:
    """What `out` holds beside an earlier export. Raises ConfigError if it is a file, or holds files and no earlier export."""
    if not out.exists():
        return []
    require(out.is_dir(), "--out", str(out), "is a file: name a folder")
    present, ours = list(out.iterdir()), _written_by_export(out)
    remedy = "holds files, and no earlier export that could be replaced; name another folder or remove it"
    require(bool(ours) or not present, "--out", str(out), remedy)
    return [path for path in present if path.name not in ours]


def _written_by_export(out: Path) -> set[str]:
    """The names of files that an export may have written, if `out` holds its weights."""
    for layout in FORMATS.values():
        weights = out / layout.WEIGHTS
        if weights.is_file():
            with contextlib.suppress(safetensors.SafetensorError), safetensors.safe_open(weights, "numpy") as file:
                if (file.metadata() or {}).get("producer") == PRODUCER:
                    return {layout.WEIGHTS, *CONFIGS, *TOKENIZER, *sentence_transformers.FILES}
    return set()
