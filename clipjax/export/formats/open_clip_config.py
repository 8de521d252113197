"""open_clip's configuration as ours: its model, and how it resizes images."""

from collections.abc import Collection, Mapping
from typing import Any

from clipjax.config import Activation, Decoder, ImageTower, Model, TextTower, require
from clipjax.data.images.resize import Resize
from clipjax.export.formats.open_clip import EPS, TRUNKS

# A field of a configuration is read, ignored or refused.
#
# Read: clipjax has it too. Here with the defaults of open_clip 3.3: `CLIPVisionCfg` and `CLIPTextCfg` in its model.py,
# `MultimodalCfg` in coca_model.py, `PreprocessCfg` in transform.py.
MLP = dict(mlp_ratio=4.0, act_kwargs=None, norm_kwargs=None)
VISION = dict(layers=12, width=768, head_width=64, patch_size=16, image_size=224, patch_dropout=0.0, no_ln_pre=False) | MLP
VISION |= dict(attentional_pool=False, attn_pooler_queries=256, attn_pooler_heads=8, pool_type="tok", final_ln_after_pool=False)
TIMM = dict(timm_model_name=None, timm_pool="avg", timm_proj="linear", image_size=224, patch_dropout=0.0)
TEXT = dict(context_length=77, vocab_size=49408, width=512, heads=8, layers=12, no_causal_mask=False, embed_cls=False) | MLP
TEXT |= dict(pool_type="argmax", eos_id=2, proj_type="linear", proj_bias=False)
DECODER = dict(context_length=77, vocab_size=49408, width=512, heads=8, layers=12)
MODEL = dict(embed_dim=None, vision_cfg=None, text_cfg=None, multimodal_cfg=None, quick_gelu=False, init_logit_bias=None)
PREPROCESS = dict(size=None, mean=ImageTower.mean, std=ImageTower.std, interpolation="bicubic", resize_mode="shortest")
# Ignored: it changes neither what the weights compute nor their names. The tokenizer's: `open_clip_words` reads them.
IGNORED = {
    *("output_tokens", "output_dict", "custom_text", "init_logit_scale", "nonscalar_logit_scale", "pos_embed_type", "fill_color"),
    *("dim_head", "n_queries", "timm_model_pretrained", "timm_drop", "timm_drop_path"),
    *("hf_tokenizer_name", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "tokenizer_mode", "tokenizer_kwargs"),
}
# Refused: any other field, unless it has the one value that clipjax computes too: this one, else null or false.
ACCEPTED = {"mode": "RGB", "pad_id": 0, "block_type": "default"}


def model_of(given: Mapping[str, Any], mean: tuple[float, ...], std: tuple[float, ...]) -> Model:
    """Our model for open_clip's `model_cfg`. `mean`, `std`: by which it normalises images.

    Raises ConfigError for a field that clipjax has not, unless it changes nothing.
    """
    cfg = _read("model_cfg", given, MODEL)
    quick, embed_dim = cfg["quick_gelu"], cfg["embed_dim"]
    for name in ("embed_dim", "vision_cfg", "text_cfg"):
        require(cfg[name] is not None, f"model_cfg.{name}", None, "is missing: this is not a configuration of open_clip's")
    pixels = dict(mean=mean, std=std)
    towers = _image(cfg["vision_cfg"], embed_dim, quick, **pixels), _text(cfg["text_cfg"], embed_dim, quick)
    head = None if cfg["multimodal_cfg"] is None else _decoder(cfg["multimodal_cfg"], towers[1])
    last = cfg["vision_cfg"].get("final_ln_after_pool") and not cfg["vision_cfg"].get("attentional_pool")
    remedy = "open_clip's CoCa gives its decoder patches without a norm then, and clipjax's has one"
    require(head is None or not last, "vision_cfg.final_ln_after_pool", last, remedy)
    return Model(image=towers[0], text=towers[1], decoder=head, init_bias=cfg["init_logit_bias"])


def _image(given: Mapping[str, Any], embed_dim: int, quick: bool, **pixels: Any) -> ImageTower:
    if given.get("timm_model_name"):
        # The name of timm's model defines the rest; open_clip ignores the fields of its native tower.
        return _trunk(_read("vision_cfg", given, TIMM, ignored=VISION.keys()), embed_dim, pixels)
    cfg = _read("vision_cfg", given, VISION)
    width, side, layers = cfg["width"], _square("vision_cfg.image_size", cfg["image_size"]), cfg["layers"]
    require(isinstance(layers, int), "vision_cfg.layers", layers, "is a residual network's: clipjax has vision transformers only")
    pooler, pool = cfg["attentional_pool"], {"tok": "cls", "avg": "avg"}.get(cfg["pool_type"])
    remedy = "must be true or false: open_clip's other poolers fail"
    require(isinstance(pooler, bool), "vision_cfg.attentional_pool", pooler, remedy)
    known = pool == "cls" if pooler else pool is not None
    require(known, "vision_cfg.pool_type", cfg["pool_type"], "clipjax has tok, and avg where there is no attentional_pool")
    norm_pooled = pool == "avg" and cfg["final_ln_after_pool"]  # one vector's norm: with `tok` both orders are the same
    patch = _square("vision_cfg.patch_size", cfg["patch_size"])
    return ImageTower(
        **dict(image_size=side, patch_size=patch, width=width, depth=layers, heads=width // cfg["head_width"]),
        **dict(embed_dim=embed_dim, pool="single" if pooler else pool, norm_pooled=norm_pooled, pre_norm=not cfg["no_ln_pre"]),
        **dict(queries=cfg["attn_pooler_queries"], pool_heads=cfg["attn_pooler_heads"], patch_dropout=cfg["patch_dropout"]),
        **_mlp("vision_cfg", cfg, quick),
        **pixels,
    )


def _trunk(cfg: Mapping[str, Any], embed_dim: int, pixels: Mapping[str, Any]) -> ImageTower:
    name = cfg["timm_model_name"].partition(".")[0]
    found = next((shape for shape, known in TRUNKS.items() if known == name), None)
    remedy = f"of timm's towers clipjax has {', '.join(TRUNKS.values())}"
    require(found is not None, "vision_cfg.timm_model_name", name, remedy)
    assert found is not None
    require(cfg["timm_pool"] == "map", "vision_cfg.timm_pool", cfg["timm_pool"], "SigLIP's towers pool by map")
    require(cfg["timm_proj"] in ("none", "linear"), "vision_cfg.timm_proj", cfg["timm_proj"], "must be none or linear")
    size, patch, side, activation = found
    size_given = _square("vision_cfg.image_size", cfg["image_size"])
    require(size_given == side, "vision_cfg.image_size", size_given, f"{name} has {side}")
    shape = dict(image_size=side, activation=activation, patch_dropout=cfg["patch_dropout"])
    project = dict(embed_dim=embed_dim if cfg["timm_proj"] == "linear" else None)
    return ImageTower.siglip(f"{size}/{patch}", **shape, **project, **pixels)


def _text(given: Mapping[str, Any], embed_dim: int, quick: bool) -> TextTower:
    remedy = "clipjax has no text tower of transformers'"
    require(not given.get("hf_model_name"), "text_cfg.hf_model_name", given.get("hf_model_name"), remedy)
    # open_clip 3.3 reads `pad_id` for the mask beside a class token only, and `final_ln_after_pool` of a text tower nowhere.
    ignored = ("final_ln_after_pool",) if given.get("embed_cls") else ("final_ln_after_pool", "pad_id")
    cfg = _read("text_cfg", given, TEXT, ignored)
    pool = "cls" if cfg["embed_cls"] else {"argmax": "eot", "eos": "eos", "last": "last"}.get(cfg["pool_type"])
    remedy = "clipjax has argmax, eos, last and a class token (embed_cls)"
    require(pool is not None, "text_cfg.pool_type", cfg["pool_type"], remedy)
    return TextTower(
        **(dict(eos_id=cfg["eos_id"]) if pool == "eos" else {}),
        **dict(length=cfg["context_length"], vocab_size=cfg["vocab_size"], width=cfg["width"], depth=cfg["layers"]),
        **dict(heads=cfg["heads"], causal=not cfg["no_causal_mask"], pool=pool, legacy_mask=pool == "cls"),
        **dict(embed_dim=None if cfg["proj_type"] == "none" else embed_dim, projection_bias=cfg["proj_bias"]),
        **_mlp("text_cfg", cfg, quick),
    )


def _decoder(given: Mapping[str, Any], text: TextTower) -> Decoder:
    # open_clip builds its decoder without the ratio, activation and norm of this section.
    cfg = _read("multimodal_cfg", given, DECODER, ignored=(*MLP, "attn_pooler_heads"))
    for name, own in (("width", text.width), ("vocab_size", text.vocab_size)):
        require(cfg[name] == own, f"multimodal_cfg.{name}", cfg[name], f"must be the text tower's {own}")
    remedy = f"must be at least the text tower's {text.length}"
    require(cfg["context_length"] >= text.length, "multimodal_cfg.context_length", cfg["context_length"], remedy)
    return Decoder(depth=cfg["layers"], heads=cfg["heads"], mlp_dim=4 * text.width, mlps=2)


def _mlp(name: str, cfg: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    """The fields of the MLP and of the norms, which both native towers have."""
    act, norm = cfg["act_kwargs"] or {}, cfg["norm_kwargs"] or {}
    require(set(norm) <= {"eps"}, f"{name}.norm_kwargs", norm, "clipjax has eps only")
    approximate = act.get("approximate", "none")
    plain = set(act) <= {"approximate"} and approximate in ("none", "tanh") and not (quick and act)
    require(plain, f"{name}.act_kwargs", act, "clipjax has gelu, its tanh approximation and quick_gelu")
    activation: Activation = "quick_gelu" if quick else "gelu_tanh" if approximate == "tanh" else "gelu"
    return dict(mlp_dim=int(cfg["width"] * cfg["mlp_ratio"]), activation=activation, norm_eps=norm.get("eps", EPS))


def _read(name: str, given: Mapping[str, Any], defaults: Mapping[str, Any], ignored: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a section that are in `defaults`. Raises ConfigError for a field that is neither read nor ignored."""
    for field in given.keys() - defaults.keys() - IGNORED - set(ignored):
        value = given[field]
        accepted = value == ACCEPTED[field] if field in ACCEPTED else value in (None, False)
        require(accepted, f"{name}.{field}", value, "clipjax has nothing like it")
    return dict(defaults) | {field: value for field, value in given.items() if field in defaults}


def _square(name: str, size: Any) -> int:
    sides = size if isinstance(size, list | tuple) else [size]
    require(len(set(sides)) == 1, name, size, "clipjax has square images only")
    return sides[0]


def preprocessing(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `preprocess_cfg`, with open_clip's defaults. Raises ConfigError for one that clipjax has not."""
    return _read("preprocess_cfg", given, PREPROCESS)


def resize_of(pixels: Mapping[str, Any]) -> Resize:
    """Our `data.resize` for a `preprocess_cfg`. Its size says nothing: open_clip takes the tower's."""
    mode, kernel = pixels["resize_mode"], pixels["interpolation"]
    require(kernel in ("bicubic", "bilinear"), "preprocess_cfg.interpolation", kernel, "clipjax resizes bicubic only")
    known: dict[str, Resize] = {"squash": "squash", "shortest": "crop"}
    require(mode in known, "preprocess_cfg.resize_mode", mode, "clipjax has squash and shortest")
    return known[mode]
