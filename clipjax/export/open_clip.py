"""open_clip 3.3's layout: its native CLIP, and SigLIP as a CustomTextCLIP whose image tower is one of timm's by name."""

from typing import Any

from clipjax.config import SIZES, ImageTower, Model, TextTower, require
from clipjax.export.table import BlockNames, Row, Table, blocks, linear, norm, row

WEIGHTS = "open_clip_model.safetensors"
NATIVE = BlockNames("ln_1.{w}", ("attn.in_proj_{w}",), "attn.out_proj.{w}", "ln_2.{w}", "mlp.c_fc.{w}", "mlp.c_proj.{w}")
TIMM = BlockNames("norm1.{w}", ("attn.qkv.{w}",), "attn.proj.{w}", "norm2.{w}", "mlp.fc1.{w}", "mlp.fc2.{w}")

# open_clip 3.3 can't pass a size or an activation to timm: (tower, patch, image size) must be one that timm has a name for.
TRUNKS = {
    **{("B", 16, side, "gelu"): f"vit_base_patch16_siglip_{side}" for side in (224, 256, 384, 512)},
    ("B", 32, 256, "gelu_tanh"): "vit_base_patch32_siglip_256",
    **{("L", 16, side, "gelu"): f"vit_large_patch16_siglip_{side}" for side in (256, 384)},
    ("L", 16, 512, "gelu_tanh"): "vit_large_patch16_siglip_512",
    **{("So400m", 14, side, "gelu"): f"vit_so400m_patch14_siglip_{side}" for side in (224, 378)},
    **{("So400m", 16, side, "gelu_tanh"): f"vit_so400m_patch16_siglip_{side}" for side in (256, 384, 512)},
}


def refuse(model: Model) -> None:
    """Raises ConfigError where open_clip 3.3 has no such tower, with the reason."""
    image, text = model.image, model.text
    require(image.pool != "mean", "model.image.pool", image.pool, "open_clip 3.3 has no tower without class token that averages")
    if image.pool == "map":
        remedy = "open_clip 3.3 can name SigLIP towers only at timm's published sizes, and this is none of "
        remedy += ", ".join(TRUNKS.values()) + "; use --to transformers"
        require(trunk(image) is not None, "model.image", _shape(image), remedy)
        require(image.norm_eps == 1e-6, "model.image.norm_eps", image.norm_eps, "timm has 1e-6; use --to transformers")
        require(not image.pre_norm, "model.image.pre_norm", True, "timm's SigLIP towers have none")
        require(image.patch_bias, "model.image.patch_bias", False, "timm's SigLIP towers have one")
    else:
        require(image.embed_dim is not None, "model.image.embed_dim", None, "open_clip's CLIP always projects")
        require(not image.patch_bias, "model.image.patch_bias", True, "open_clip's CLIP has none")
        quick = [tower.activation == "quick_gelu" for tower in (image, text)]
        remedy = f"open_clip has quick_gelu in both towers or in none, and model.image.activation is {image.activation!r}"
        require(quick[0] == quick[1], "model.text.activation", text.activation, remedy)


def trunk(image: ImageTower) -> str | None:
    """timm's name for a SigLIP image tower, or None."""
    shape = (image.width, image.depth, image.mlp_dim, image.heads)
    size = next((name for name, published in SIZES.items() if published == shape), None)
    return TRUNKS.get((size, image.patch_size, image.image_size, image.activation))


def _shape(image: ImageTower) -> str:
    return f"{image.width} wide, {image.depth} deep, patch {image.patch_size}, {image.image_size} px, {image.activation}"


def table(model: Model) -> Table:
    """Every tensor of the model, in open_clip's names."""
    return Table((*_scalars(model), *_image(model.image), *_text(model.text, "text." if model.image.pool == "map" else "")))


def _scalars(model: Model) -> list[Row]:
    bias = [] if model.init_bias is None else [row("logit_bias", "bias", " -> ")]
    return [row("logit_scale", "log_scale", " -> "), *bias]


def _image(image: ImageTower) -> list[Row]:
    if image.pool == "map":
        theirs, ours = "visual.trunk.attn_pool.", "image/map"
        project = linear("visual.head.proj.{w}", "image/projection", "d e -> e d", bias=False)
        return [
            *linear("visual.trunk.patch_embed.proj.{w}", "image/patch", "p q c d -> d c p q"),
            row("visual.trunk.pos_embed", "image/positions", "n d -> 1 n d"),
            *blocks(TIMM, "visual.trunk.blocks.{i}.", "image/blocks"),
            *norm("visual.trunk.norm.{w}", "image/norm"),
            row(theirs + "latent", f"{ours}/probe", "d -> 1 1 d"),
            *linear(theirs + "q.{w}", f"{ours}/query", "d h k -> (h k) d"),
            *linear(theirs + "kv.{w}", f"{ours}/key_value", "d s h k -> (s h k) d"),
            *linear(theirs + "proj.{w}", f"{ours}/out", "h k d -> d (h k)"),
            *norm(theirs + "norm.{w}", f"{ours}/norm"),
            *linear(theirs + "mlp.fc1.{w}", f"{ours}/mlp/up", "d f -> f d"),
            *linear(theirs + "mlp.fc2.{w}", f"{ours}/mlp/down", "f d -> d f"),
            *(project if image.embed_dim is not None else []),
        ]
    return [
        *linear("visual.conv1.{w}", "image/patch", "p q c d -> d c p q", bias=False),
        row("visual.class_embedding", "image/class_token", "d -> d"),
        row("visual.positional_embedding", "image/positions", "n d -> n d"),
        *(norm("visual.ln_pre.{w}", "image/pre_norm") if image.pre_norm else []),
        *blocks(NATIVE, "visual.transformer.resblocks.{i}.", "image/blocks"),
        *norm("visual.ln_post.{w}", "image/norm"),
        row("visual.proj", "image/projection/kernel", "d e -> d e"),
    ]


def _text(text: TextTower, prefix: str) -> list[Row]:
    if text.embed_dim is None:
        project = []
    elif text.projection_bias:
        project = linear(prefix + "text_projection.{w}", "text/projection", "d e -> e d")
    else:
        project = [row(prefix + "text_projection", "text/projection/kernel", "d e -> d e")]
    return [
        row(prefix + "token_embedding.weight", "text/tokens", "v d -> v d"),
        row(prefix + "positional_embedding", "text/positions", "t d -> t d"),
        *blocks(NATIVE, prefix + "transformer.resblocks.{i}.", "text/blocks"),
        *norm(prefix + "ln_final.{w}", "text/norm"),
        *project,
    ]


def configs(model: Model, special: dict[str, int | None], resize: str) -> dict[str, Any]:
    """open_clip_config.json. The tokenizer's files are the folder's own, whatever `hf_tokenizer_name` says."""
    image, text = model.image, model.text
    if image.pool == "map":
        project = "none" if image.embed_dim is None else "linear"
        vision = dict(timm_model_name=trunk(image), timm_model_pretrained=False, timm_pool="map", timm_proj=project)
    else:
        shape = dict(layers=image.depth, width=image.width, head_width=image.width // image.heads, patch_size=image.patch_size)
        vision = dict(**shape, **_kwargs(image), no_ln_pre=not image.pre_norm)
    words = dict(
        **dict(context_length=text.length, vocab_size=text.vocab_size, hf_tokenizer_name="in-this-folder"),
        **dict(width=text.width, heads=text.heads, layers=text.depth, no_causal_mask=not text.causal, **_kwargs(text)),
        **dict(pool_type="argmax" if text.pool == "eot" else "last", pad_id=special["pad"], eos_id=special["eos"]),
        **dict(proj_type="none" if text.embed_dim is None else "linear", proj_bias=text.projection_bias),
    )
    vision["image_size"] = image.image_size
    config: dict[str, Any] = dict(embed_dim=model.embed_dim, vision_cfg=vision, text_cfg=words)
    if text.activation == "quick_gelu":
        config["quick_gelu"] = True
    if image.pool == "map":
        config["custom_text"] = True
    if model.init_bias is not None:
        config["init_logit_bias"] = model.init_bias
    mode = {"squash": "squash", "crop": "shortest"}[resize]
    preprocess = dict(size=image.image_size, mean=image.mean, std=image.std, interpolation="bicubic", resize_mode=mode)
    return {"open_clip_config.json": dict(model_cfg=config, preprocess_cfg=preprocess)}


def _kwargs(tower: ImageTower | TextTower) -> dict[str, Any]:
    """What both native towers are told. open_clip multiplies the width by `mlp_ratio` and truncates."""
    ratio = tower.mlp_dim / tower.width
    if int(tower.width * ratio) != tower.mlp_dim:
        ratio = (tower.mlp_dim + 0.5) / tower.width
    tanh = dict(act_kwargs=dict(approximate="tanh")) if tower.activation == "gelu_tanh" else {}
    return dict(mlp_ratio=ratio, norm_kwargs=dict(eps=tower.norm_eps), **tanh)
