"""Reads a folder of open_clip's, as `export` or open_clip itself writes one: its configuration as ours, and its weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.numpy

from clipjax.config import Activation, ConfigError, Decoder, ImageTower, Model, TextTower, require
from clipjax.export.open_clip import EPS, TRUNKS, WEIGHTS, custom, refuse
from clipjax.export.table import Tensors

CONFIG = "open_clip_config.json"
NAMES = (WEIGHTS, "open_clip_pytorch_model.safetensors", "model.safetensors")
PICKLED = (".bin", ".pt", ".pth")

# What open_clip's dataclasses hold where a configuration is silent, of those fields that we have too.
MLP = dict(mlp_ratio=4.0, act_kwargs=None, norm_kwargs=None)
VISION = dict(layers=12, width=768, head_width=64, patch_size=16, image_size=224, patch_dropout=0.0, no_ln_pre=False) | MLP
VISION |= dict(attentional_pool=False, attn_pooler_queries=256, attn_pooler_heads=8)
TIMM = dict(timm_model_name=None, timm_pool="avg", timm_proj="linear", image_size=224, patch_dropout=0.0)
TEXT = dict(context_length=77, vocab_size=49408, width=512, heads=8, layers=12, no_causal_mask=False, embed_cls=False) | MLP
TEXT |= dict(pool_type="argmax", proj_type="linear", proj_bias=False)
HEAD = dict(context_length=77, vocab_size=49408, width=512, heads=8, layers=12)
MODEL = dict(embed_dim=None, vision_cfg=None, text_cfg=None, multimodal_cfg=None, quick_gelu=False, init_logit_bias=None)
PIXELS = dict(size=None, mean=ImageTower.mean, std=ImageTower.std, interpolation="bicubic", resize_mode="shortest")
# What changes nothing: in what the weights compute, or in our choice of names.
IDLE = {
    "output_tokens",
    "timm_model_pretrained",
    "timm_drop",
    "timm_drop_path",
    "custom_text",
    "init_logit_scale",
    "pos_embed_type",
}
IDLE |= {"hf_tokenizer_name", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "eos_id", "fill_color", "dim_head"}
IDLE |= {"tokenizer_mode", "tokenizer_kwargs", "n_queries"}
# What must be so, where it is told at all; any other field must be null or false.
PLAIN = {"pool_type": "tok", "mode": "RGB", "pad_id": 0}


class Folder(NamedTuple):
    """What a folder of open_clip's holds."""

    model: Model
    resize: str
    tensors: Tensors
    notes: list[str]  # what is not taken over


def read(folder: Path) -> Folder:
    """Raises ConfigError for what is missing or broken, and for a model that we have not, with field, value and remedy."""
    require(folder.is_dir(), "SRC", str(folder), f"is not a folder; name one that holds {CONFIG} and its weights")
    file = folder / CONFIG
    require(file.is_file(), "SRC", str(folder), f"has no {CONFIG}, which open_clip writes beside weights")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        given, pixels = dict(config["model_cfg"]), dict(config.get("preprocess_cfg") or {})
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: is not a configuration of open_clip: {type(error).__name__}: {error}") from error
    pixels = _section("preprocess_cfg", pixels, PIXELS)
    model = model_of(given, tuple(pixels["mean"]), tuple(pixels["std"]))
    refuse(model)
    tensors = _weights(folder)
    if not custom(model):  # a CustomTextCLIP whose text tower is CLIP's
        tensors = {name.removeprefix("text."): tensor for name, tensor in tensors.items()}
    cleaning = (given["text_cfg"].get("tokenizer_kwargs") or {}).get("clean")
    told = f"text_cfg.tokenizer_kwargs.clean = {cleaning!r}: what open_clip does to a string before its tokenizer sees it"
    return Folder(model, _resize(pixels, model), tensors, [told] * (cleaning is not None))


def model_of(given: Mapping[str, Any], mean: tuple[float, ...], std: tuple[float, ...]) -> Model:
    """Our model for open_clip's `model_cfg`, of pictures with this mean and standard deviation.

    Raises ConfigError for a field that we have nothing for, unless it changes nothing.
    """
    cfg = _section("model_cfg", given, MODEL)
    quick, embed_dim = cfg["quick_gelu"], cfg["embed_dim"]
    for name in ("embed_dim", "vision_cfg", "text_cfg"):
        require(cfg[name] is not None, f"model_cfg.{name}", None, "is missing: this is not a configuration of open_clip's")
    pixels = dict(mean=mean, std=std)
    towers = _image(cfg["vision_cfg"], embed_dim, quick, **pixels), _text(cfg["text_cfg"], embed_dim, quick)
    head = None if cfg["multimodal_cfg"] is None else _decoder(cfg["multimodal_cfg"], towers[1])
    return Model(image=towers[0], text=towers[1], decoder=head, init_bias=cfg["init_logit_bias"])


def _image(given: Mapping[str, Any], embed_dim: int, quick: bool, **pixels: Any) -> ImageTower:
    if given.get("timm_model_name"):
        told = {
            name: value for name, value in given.items() if name in TIMM or name not in VISION
        }  # timm's name tells the others
        return _trunk(_section("vision_cfg", told, TIMM), embed_dim, pixels)
    cfg = _section("vision_cfg", given, VISION)
    width, side, layers = cfg["width"], _square("vision_cfg.image_size", cfg["image_size"]), cfg["layers"]
    require(isinstance(layers, int), "vision_cfg.layers", layers, "is a residual network's: clipjax has vision transformers only")
    pool = cfg["attentional_pool"]
    require(isinstance(pool, bool), "vision_cfg.attentional_pool", pool, "must be true or false: open_clip's other poolers fail")
    return ImageTower(
        **dict(image_size=side, patch_size=cfg["patch_size"], width=width, depth=layers, heads=width // cfg["head_width"]),
        **dict(embed_dim=embed_dim, pool="single" if pool else "cls", pre_norm=not cfg["no_ln_pre"]),
        **dict(queries=cfg["attn_pooler_queries"], pool_heads=cfg["attn_pooler_heads"], patch_dropout=cfg["patch_dropout"]),
        **_mlp("vision_cfg", cfg, quick),
        **pixels,
    )


def _trunk(cfg: Mapping[str, Any], embed_dim: int, pixels: Mapping[str, Any]) -> ImageTower:
    name = cfg["timm_model_name"].partition(".")[0]
    found = next((shape for shape, known in TRUNKS.items() if known == name), None)
    remedy = f"of timm's towers clipjax has {', '.join(TRUNKS.values())}"
    require(found is not None, "vision_cfg.timm_model_name", name, remedy)
    require(cfg["timm_pool"] == "map", "vision_cfg.timm_pool", cfg["timm_pool"], "SigLIP's towers pool by map")
    require(cfg["timm_proj"] in ("none", "linear", ""), "vision_cfg.timm_proj", cfg["timm_proj"], "must be none or linear")
    size, patch, side, activation = found
    size_given = _square("vision_cfg.image_size", cfg["image_size"])
    require(size_given == side, "vision_cfg.image_size", size_given, f"{name} has {side}")
    shape = dict(image_size=side, activation=activation, patch_dropout=cfg["patch_dropout"])
    project = dict(embed_dim=embed_dim if cfg["timm_proj"] == "linear" else None)
    return ImageTower.siglip(f"{size}/{patch}", **shape, **project, **pixels)


def _text(given: Mapping[str, Any], embed_dim: int, quick: bool) -> TextTower:
    remedy = "clipjax has no text tower of transformers'"
    require(not given.get("hf_model_name"), "text_cfg.hf_model_name", given.get("hf_model_name"), remedy)
    own = {} if given.get("embed_cls") else {"pad_id": given.get("pad_id")}  # only a mask beside a class token asks for it
    cfg = _section("text_cfg", given, TEXT | own)
    pool = "cls" if cfg["embed_cls"] else {"argmax": "eot", "last": "last"}.get(cfg["pool_type"])
    require(pool is not None, "text_cfg.pool_type", cfg["pool_type"], "clipjax has argmax, last and a class token (embed_cls)")
    return TextTower(
        **dict(length=cfg["context_length"], vocab_size=cfg["vocab_size"], width=cfg["width"], depth=cfg["layers"]),
        **dict(heads=cfg["heads"], causal=not cfg["no_causal_mask"], pool=pool, legacy_mask=pool == "cls"),
        **dict(embed_dim=None if cfg["proj_type"] == "none" else embed_dim, projection_bias=cfg["proj_bias"]),
        **_mlp("text_cfg", cfg, quick),
    )


def _decoder(given: Mapping[str, Any], text: TextTower) -> Decoder:
    # open_clip makes its decoder without the ratio, activation and norm that are told here.
    cfg = _section("multimodal_cfg", {k: v for k, v in given.items() if k not in (*MLP, "attn_pooler_heads")}, HEAD)
    for name, own in (("width", text.width), ("vocab_size", text.vocab_size)):
        require(cfg[name] == own, f"multimodal_cfg.{name}", cfg[name], f"must be the text tower's {own}")
    remedy = f"must be at least the text tower's {text.length}"
    require(cfg["context_length"] >= text.length, "multimodal_cfg.context_length", cfg["context_length"], remedy)
    return Decoder(depth=cfg["layers"], heads=cfg["heads"], mlp_dim=4 * text.width, mlps=2)


def _mlp(name: str, cfg: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    """What both native towers tell of their MLP and norms."""
    act, norm = cfg["act_kwargs"] or {}, cfg["norm_kwargs"] or {}
    require(set(norm) <= {"eps"}, f"{name}.norm_kwargs", norm, "clipjax has eps only")
    approximate = act.get("approximate", "none")
    plain = set(act) <= {"approximate"} and approximate in ("none", "tanh") and not (quick and act)
    require(plain, f"{name}.act_kwargs", act, "clipjax has gelu, its tanh approximation and quick_gelu")
    activation: Activation = "quick_gelu" if quick else "gelu_tanh" if approximate == "tanh" else "gelu"
    return dict(mlp_dim=int(cfg["width"] * cfg["mlp_ratio"]), activation=activation, norm_eps=norm.get("eps", EPS))


def _section(name: str, given: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a configuration, with open_clip's defaults. Raises ConfigError for what we have nothing for and is not idle."""
    for field in given.keys() - ours.keys() - IDLE:
        value = given[field]
        plain = value == PLAIN[field] if field in PLAIN else value in (None, False)
        require(plain, f"{name}.{field}", value, "clipjax has nothing like it")
    return dict(ours) | {field: value for field, value in given.items() if field in ours}


def _square(name: str, size: Any) -> int:
    sides = size if isinstance(size, list | tuple) else [size]
    require(len(set(sides)) == 1, name, size, "clipjax has square pictures only")
    return sides[0]


def _resize(pixels: Mapping[str, Any], model: Model) -> str:
    """What `data.resize` is called there."""
    mode, kernel = pixels["resize_mode"], pixels["interpolation"]
    require(kernel == "bicubic", "preprocess_cfg.interpolation", kernel, "clipjax resizes with bicubic only")
    known = {"squash": "squash", "shortest": "crop"}
    require(mode in known, "preprocess_cfg.resize_mode", mode, "clipjax has squash and shortest")
    side = model.image.image_size if pixels["size"] is None else _square("preprocess_cfg.size", pixels["size"])
    require(side == model.image.image_size, "preprocess_cfg.size", side, f"must be the tower's {model.image.image_size}")
    return known[mode]


def _weights(folder: Path) -> Tensors:
    file = next((folder / name for name in NAMES if (folder / name).is_file()), None)
    if file is None:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
        remedy = f"has no weights as {', '.join(NAMES)}"
        if pickled:
            remedy = f"has its weights as {pickled[0]} only, which PyTorch alone can read, and which may run any program: load "
            remedy += f"it there, `safetensors.torch.save_file(model.state_dict(), '{WEIGHTS}')`, and name that folder"
        raise ConfigError(f"SRC = {str(folder)!r}: {remedy}")
    try:
        return safetensors.numpy.load_file(file)
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{file}: is not a whole file of safetensors: {error}") from error
