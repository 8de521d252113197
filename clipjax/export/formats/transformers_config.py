"""Reads transformers' config.json and preprocessor_config.json as our model.

Of a config.json the fields that transformers' models read are read, with the defaults of 5.23 (configuration_clip.py,
configuration_siglip.py); the rest changes nothing there either.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from clipjax.config import Activation, ConfigError, ImageTower, Model, TextTower, require
from clipjax.data.images.resize import Resize

CONFIG = "config.json"
Family = Literal["clip", "siglip"]
Towers = Literal["both", "image", "text"]
# model_type -> the family, and the towers that its weights may have. MetaCLIP 2's model is CLIP's but for the end token.
TYPES: dict[str, tuple[Family, Towers]] = {
    **dict.fromkeys(("clip", "metaclip_2"), ("clip", "both")),
    **{f"{name}_vision_model": ("clip", "image") for name in ("clip", "metaclip_2")},
    **{f"{name}_text_model": ("clip", "text") for name in ("clip", "metaclip_2")},
    **dict(siglip=("siglip", "both"), siglip_vision_model=("siglip", "image"), siglip_text_model=("siglip", "text")),
}
EITHER = dict(num_hidden_layers=12, layer_norm_eps=1e-5, hidden_act="quick_gelu")
VISION = EITHER | dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=512)
VISION |= dict(num_channels=3, image_size=224, patch_size=32)
TEXT = EITHER | dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8, projection_dim=512)
TEXT |= dict(vocab_size=49408, max_position_embeddings=77, eos_token_id=49407)
SIGLIP = dict(layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh", hidden_size=768, num_attention_heads=12)
SIGLIP |= dict(intermediate_size=3072, projection_size=None)
DEFAULTS: dict[tuple[Family, str], dict[str, Any]] = {
    ("clip", "vision"): VISION,
    ("clip", "text"): TEXT,
    ("siglip", "vision"): VISION | SIGLIP | dict(patch_size=16, vision_use_head=True),
    ("siglip", "text"): TEXT | SIGLIP | dict(vocab_size=32000, max_position_embeddings=64),
}
ACTIVATIONS: dict[str, Activation] = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new", "gelu_fast", "gelu_accurate"), "gelu_tanh"),
    "quick_gelu": "quick_gelu",
}
OLD_END = 2  # as eos_token_id of a CLIPModel: the end token is the one with the highest id (modeling_clip.py, CLIPTextModel)


class Config(NamedTuple):
    """A config.json: its model's family and the sections of its towers, one of them None where it is of one tower."""

    kind: str  # model_type
    family: Family
    vision: dict[str, Any] | None
    text: dict[str, Any] | None
    architecture: str  # the class that wrote it; empty where it does not say

    @property
    def towers(self) -> Towers:
        return "both" if self.vision and self.text else "image" if self.vision else "text"


def read_config(file: Path) -> Config:
    """Raises ConfigError for a file that is no JSON object, and for a model that is neither CLIP's nor SigLIP's."""
    given = _object(file)
    kind = str(given.get("model_type"))
    remedy = "needs patches of any number and shape (NaFlex): clipjax has SigLIP 2 of a fixed resolution, whose type is siglip"
    require(not kind.startswith("siglip2"), "model_type", kind, remedy)
    require(kind in TYPES, "model_type", kind, f"of transformers' models clipjax has {', '.join(TYPES)}")
    quantized = given.get("quantization_config")
    require(quantized is None, "quantization_config", quantized, "clipjax has no quantized weights: name the original ones")
    family, towers = TYPES[kind]
    named = given.get("architectures") or [""]
    remedy = "clipjax has no classifier: name the towers' own weights"
    require(not str(named[0]).endswith("ForImageClassification"), "architectures", named, remedy)
    sections: dict[str, dict[str, Any] | None] = {"vision": None, "text": None}
    for name, tower in (("vision", "image"), ("text", "text")):
        if towers in ("both", tower):
            own = _section(given, name, family) if towers == "both" else given
            sections[name] = DEFAULTS[family, name] | {k: v for k, v in own.items() if k in DEFAULTS[family, name]}
    if towers == "both" and family == "clip":  # CLIPModel reads it here alone
        width = given.get("projection_dim", 512)
        sections = {name: (section or {}) | dict(projection_dim=width) for name, section in sections.items()}
    return Config(kind, family, sections["vision"], sections["text"], str(named[0]))


def _section(given: Mapping[str, Any], name: str, family: Family) -> dict[str, Any]:
    """A tower's section. In older files of CLIPModel `text_config_dict` with its defaults goes before `text_config`."""
    own, older = (given.get(f"{name}_config{end}") or {} for end in ("", "_dict"))
    whole = {**DEFAULTS[family, name], **older} if older and family == "clip" else {}
    return {**own, **whole}


def make_model(config: Config, towers: Towers, projected: bool) -> Model:
    """Our model. `towers`: those that the weights have. `projected`: a tower of CLIP's alone has a projection.

    Raises ConfigError for what clipjax has not.
    """
    parts: dict[str, Any] = {}
    siglip = config.family == "siglip"
    if towers != "text" and config.vision is not None:
        parts["image"] = _image(config.vision, siglip, projected)
    if towers != "image" and config.text is not None:
        parts["text"] = _text(config.text, siglip, projected, config.kind)
    scalars = dict[str, Any](init_scale=10.0, init_bias=-10.0) if siglip and towers == "both" else {}  # SigLIP's at its start
    return Model(towers=towers, **parts, **scalars)


def _image(cfg: Mapping[str, Any], siglip: bool, projected: bool) -> ImageTower:
    where = "vision_config"
    require(cfg["num_channels"] == 3, f"{where}.num_channels", cfg["num_channels"], "clipjax has images of three channels only")
    head = cfg.get("vision_use_head", True)
    require(head, f"{where}.vision_use_head", head, "without its head the tower has tokens and no embedding")
    sides = {name: square(f"{where}.{name}", cfg[name]) for name in ("image_size", "patch_size")}
    half = (0.5, 0.5, 0.5)
    family = dict[str, Any](pool="map", pre_norm=False, patch_bias=True, embed_dim=None, mean=half, std=half)
    family = family if siglip else dict[str, Any](embed_dim=cfg["projection_dim"] if projected else None)
    return ImageTower(**_tower(where, cfg), **sides, **family)


def _text(cfg: Mapping[str, Any], siglip: bool, projected: bool, kind: str) -> TextTower:
    shape = dict(length=cfg["max_position_embeddings"], vocab_size=cfg["vocab_size"]) | _tower("text_config", cfg)
    if siglip:
        width = cfg["hidden_size"] if cfg["projection_size"] is None else cfg["projection_size"]
        return TextTower(**shape, embed_dim=width, projection_bias=True, causal=False, pool="last")
    return TextTower(**shape, embed_dim=cfg["projection_dim"] if projected else None, **_end(cfg, kind))


def _end(cfg: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """How the end token is found: by the highest id, or by its own."""
    end = cfg["eos_token_id"]
    end = end[0] if isinstance(end, list) and len(end) == 1 else end
    if (kind.startswith("clip") and end == OLD_END) or end == cfg["vocab_size"] - 1:
        return dict(pool="eot")
    inside = isinstance(end, int) and 0 <= end < cfg["vocab_size"]
    remedy = f"must be the id of the end token, below vocab_size = {cfg['vocab_size']}: transformers pools there"
    require(inside, "text_config.eos_token_id", end, remedy)
    return dict(pool="eos", eos_id=end)


def _tower(where: str, cfg: Mapping[str, Any]) -> dict[str, Any]:
    activation = cfg["hidden_act"]
    require(activation in ACTIVATIONS, f"{where}.hidden_act", activation, f"clipjax has {', '.join(ACTIVATIONS)}")
    shape = dict(width=cfg["hidden_size"], depth=cfg["num_hidden_layers"], heads=cfg["num_attention_heads"])
    return shape | dict[str, Any](
        mlp_dim=cfg["intermediate_size"], norm_eps=cfg["layer_norm_eps"], activation=ACTIVATIONS[activation]
    )


# What an image processor does where its file does not say it: a side alone is the shorter edge's, or that of a square.
CLIP = dict(size=224, crop_size=224, do_center_crop=True, resample=3, square=False)
CLIP |= dict(image_mean=ImageTower.mean, image_std=ImageTower.std)
HALF = dict(size=dict(height=224, width=224), crop_size=None, do_center_crop=False, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIP": CLIP,
    "Bit": CLIP,
    "Siglip": HALF | dict(resample=3, square=False),
    "ViT": HALF | dict(resample=2, square=True),
}
BICUBIC, BILINEAR = 3, 2  # of PIL's resampling filters
OTHER_FILTER = "its images are resized bilinearly (resample = 2): clipjax resizes bicubic, so embeddings of files differ a little"


class Pixels(NamedTuple):
    """What comes before an image tower."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Resize


def read_pixels(folder: Path, family: Family, side: int) -> tuple[Pixels, list[str]]:
    """The preprocessing of a folder, for images of `side` pixels, and notes on what it does not say, or clipjax does otherwise.

    processor_config.json, where it has an `image_processor`, goes before preprocessor_config.json, as in transformers. Raises
    ConfigError for a preprocessing that clipjax has not.
    """
    nested = _object(folder / "processor_config.json").get("image_processor")
    file = "processor_config.json" if nested else "preprocessor_config.json"
    given = nested or _object(folder / file)
    if not given:
        known = PROCESSORS["CLIP" if family == "clip" else "Siglip"]
        note = f"it has no {file}: images are prepared as {family}'s are"
        resize: Resize = "crop" if family == "clip" else "squash"
        return Pixels(known["image_mean"], known["image_std"], resize), [note]
    kind = given.get("image_processor_type") or given.get("feature_extractor_type") or family.capitalize()
    start = next((start for start in PROCESSORS if str(kind).lower().startswith(start.lower())), None)
    known = ", ".join(f"{name}ImageProcessor" for name in PROCESSORS)
    require(start is not None, f"{file}: image_processor_type", kind, f"clipjax has {known}")
    assert start is not None
    cfg = PROCESSORS[start] | {name: value for name, value in given.items() if value is not None}
    for name, accepted in dict(do_resize=(True,), do_rescale=(True,), resample=(BICUBIC, BILINEAR)).items():
        value = cfg.get(name, accepted[0])
        require(value in accepted, f"{file}: {name}", value, f"must be {accepted[0]}: clipjax resizes by bicubic to [0, 1]")
    notes = [OTHER_FILTER] if cfg.get("resample", BICUBIC) == BILINEAR else []
    factor = cfg.get("rescale_factor", 1 / 255)
    require(abs(255 * factor - 1) < 1e-6, f"{file}: rescale_factor", factor, "must be 1/255")
    colours = (cfg["image_mean"], cfg["image_std"]) if cfg.get("do_normalize", True) else ((0.0,) * 3, (1.0,) * 3)
    mean, std = map(_colour, colours)
    return Pixels(mean, std, _resize(file, cfg, side)), notes


def _colour(value: Any) -> tuple[float, float, float]:
    red, green, blue = map(float, value if isinstance(value, list | tuple) else [value] * 3)
    return red, green, blue


def _resize(file: str, cfg: Mapping[str, Any], side: int) -> Resize:
    """Our `data.resize` for the fields of an image processor."""
    size, crop = cfg["size"], cfg["crop_size"] if cfg["do_center_crop"] else None
    if (isinstance(size, int) and not cfg["square"]) or (isinstance(size, dict) and set(size) == {"shortest_edge"}):
        shortest = size if isinstance(size, int) else size["shortest_edge"]
        require(shortest == side, f"{file}: size", size, f"must be the tower's {side}")
        remedy = f"clipjax crops what it resizes by the shorter edge, to the tower's {side}"
        require(crop is not None and square(f"{file}: crop_size", crop) == side, f"{file}: crop_size", crop, remedy)
        return "crop"
    require(square(f"{file}: size", size) == side, f"{file}: size", size, f"must be the tower's {side}")
    require(crop is None or square(f"{file}: crop_size", crop) == side, f"{file}: crop_size", crop, f"must be {side}")
    return "squash"


def square(name: str, size: Any) -> int:
    """The side of a square: a number, a pair, or height and width. Raises ConfigError for what is none."""
    sides = [size.get("height"), size.get("width")] if isinstance(size, dict) else size
    sides = set(sides if isinstance(sides, list | tuple) else [sides])
    whole = len(sides) == 1 and all(isinstance(side, int) for side in sides)
    require(whole, name, size, "clipjax has square images and patches only")
    return sides.pop()


def _object(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file. Raises ConfigError for another content."""
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file}: is no JSON object: {type(error).__name__}: {error}") from error
