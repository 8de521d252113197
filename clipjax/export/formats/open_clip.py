"""open_clip 3.3's layout of its native CLIP, of SigLIP (a CustomTextCLIP with an image tower of timm's), and of CoCa."""

from typing import Any

from clipjax.config import SIZES, Clean, Decoder, ImageTower, Model, TextTower, require
from clipjax.export.formats.table import BlockNames, Precision, Row, Table, blocks, joined, linear, norm, row

WEIGHTS = "open_clip_model.safetensors"
EPS = 1e-5  # of the pooler's and the decoder's norms, which open_clip's configuration can't change
NATIVE = BlockNames("ln_1.{w}", ("attn.in_proj_{w}",), "attn.out_proj.{w}", "ln_2.{w}", "mlp.c_fc.{w}", "mlp.c_proj.{w}")
TIMM = BlockNames("norm1.{w}", ("attn.qkv.{w}",), "attn.proj.{w}", "norm2.{w}", "mlp.fc1.{w}", "mlp.fc2.{w}")

POOLS = {"eot": "argmax", "eos": "eos", "last": "last", "cls": "last"}  # of the text tower; with a class token it is not read

# open_clip 3.3 can't pass a size or an activation to timm: only towers that timm has a name for can be exported.
# (size, patch, image size, activation) -> timm's name
TRUNKS = {
    **{("B", 16, side, "gelu"): f"vit_base_patch16_siglip_{side}" for side in (224, 256, 384, 512)},
    ("B", 32, 256, "gelu_tanh"): "vit_base_patch32_siglip_256",
    **{("L", 16, side, "gelu"): f"vit_large_patch16_siglip_{side}" for side in (256, 384)},
    ("L", 16, 512, "gelu_tanh"): "vit_large_patch16_siglip_512",
    **{("So400m", 14, side, "gelu"): f"vit_so400m_patch14_siglip_{side}" for side in (224, 378, 384)},
    **{("So400m", 16, side, "gelu_tanh"): f"vit_so400m_patch16_siglip_{side}" for side in (256, 384, 512)},
    **{("gopt", 16, side, "gelu_tanh"): f"vit_giantopt_patch16_siglip_{side}" for side in (256, 384)},
}


def refuse(model: Model) -> None:
    """Raises ConfigError, with the reason, if open_clip 3.3 has no such model."""
    image, text = model.image, model.text
    require(
        image.pool != "mean", "model.image.pool", image.pool, "open_clip 3.3 has no tower that averages without a class token"
    )
    remedy = "open_clip 3.3 accepts it and then fails: of CoCa's poolers only single works there"
    require(image.pool not in ("cascade", "parallel"), "model.image.pool", image.pool, remedy)
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
    require(not image.projection_bias, "model.image.projection_bias", True, "open_clip's towers project without one")
    if image.pool == "single":
        require(image.norm_eps == EPS, "model.image.norm_eps", image.norm_eps, f"open_clip's pooler has {EPS:g}")
    remedy = "open_clip masks padding beside a class token one token too far, and can't do otherwise: train with True"
    require(text.pool != "cls" or text.legacy_mask, "model.text.legacy_mask", False, remedy)
    if model.decoder is not None:
        _refuse_decoder(model, model.decoder)


def _refuse_decoder(model: Model, head: Decoder) -> None:
    image, text = model.image, model.text
    require(image.pool != "map", "model.image.pool", image.pool, "a tower of timm's gives open_clip's CoCa no tokens: use single")
    require(text.pool == "cls", "model.text.pool", text.pool, "open_clip's CoCa has a class token after the text: use cls")
    remedy = "open_clip's CoCa gives its decoder patches without a norm then"
    require(not image.norm_pooled, "model.image.norm_pooled", True, remedy)
    width, remedy = image.context[1], "must be as wide as what model.decoder sees of an image: open_clip's decoder maps"
    require(width == text.width, "model.text.width", text.width, f"{remedy} keys from its own width, and that is {width}")
    remedy = "open_clip's decoder has gelu, or quick_gelu where both towers have it"
    require(text.activation != "gelu_tanh", "model.text.activation", text.activation, remedy)
    require(text.norm_eps == EPS, "model.text.norm_eps", text.norm_eps, f"open_clip's decoder has {EPS:g}")
    require(head.mlps == 2, "model.decoder.mlps", head.mlps, "open_clip's decoder has 2 in a layer")
    four = 4 * text.width
    require(head.mlp_dim == four, "model.decoder.mlp_dim", head.mlp_dim, f"open_clip's is 4 model.text.width = {four}")
    require(not head.tied, "model.decoder.tied", True, "open_clip's decoder has an output projection of its own")
    require(not head.parallel, "model.decoder.parallel", head.parallel, "open_clip's decoder has no mask tokens")


def custom(model: Model) -> bool:
    """Whether it is a CustomTextCLIP or a CoCa in open_clip, where the names of the text tower begin with `text.`."""
    return model.image.pool == "map" or model.text.pool == "cls"


def trunk(image: ImageTower) -> str | None:
    """timm's name for a SigLIP image tower, or None."""
    shape = (image.width, image.depth, image.mlp_dim, image.heads)
    size = next((name for name, published in SIZES.items() if published == shape), None)
    return TRUNKS.get((size, image.patch_size, image.image_size, image.activation)) if size else None


def _shape(image: ImageTower) -> str:
    return f"{image.width} wide, {image.depth} deep, patch {image.patch_size}, {image.image_size} px, {image.activation}"


def table(model: Model) -> Table:
    """Every tensor of the model, with its name in open_clip."""
    text = _text(model.text, "text." if custom(model) else "")
    return Table((*_scalars(model), *_image(model.image), *text, *(_decoder() if model.decoder is not None else [])))


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
        *(_pooler("visual.attn_pool.", "image/pooler", joint=image.width == image.embed_dim) if image.pool == "single" else []),
        *norm("visual.ln_post.{w}", "image/norm"),
        row("visual.proj", "image/projection/kernel", "d e -> d e"),
    ]


def _pooler(theirs: str, ours: str, joint: bool) -> list[Row]:
    return [
        row(theirs + "query", f"{ours}/queries", "q d -> q d"),
        *norm(theirs + "ln_q.{w}", f"{ours}/norm_query"),
        *norm(theirs + "ln_k.{w}", f"{ours}/norm_context"),
        *_cross_attention(theirs + "attn.", f"{ours}/attention", joint),
    ]


def _cross_attention(theirs: str, ours: str, joint: bool) -> list[Row]:
    """`joint`: the context has the width of the queries. torch then keeps queries, keys and values in one matrix, else in three;
    the bias is always one.
    """
    query, key_value = (f"{ours}/query", "d h k -> (h k) d"), (f"{ours}/key_value", "d s h k -> (s h k) d")
    weight, bias = joined((theirs + "in_proj_{w}",), (query, key_value))
    separate = [
        *linear(theirs + "q_proj_{w}", *query, bias=False),
        *joined((theirs + "k_proj_{w}", theirs + "v_proj_{w}"), (key_value,), bias=False),
    ]
    return [*([weight] if joint else separate), bias, *linear(theirs + "out_proj.{w}", f"{ours}/out", "h k d -> d (h k)")]


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
        *([row(prefix + "cls_emb", "text/class_token", "d -> d")] if text.pool == "cls" else []),
    ]


def _decoder() -> list[Row]:
    cross, ours = "text_decoder.cross_attn.{i}.", "decoder/blocks/cross"
    return [
        *blocks(NATIVE, "text_decoder.resblocks.{i}.", "decoder/blocks"),
        *norm(cross + "ln_1.{w}", f"{ours}/norm1"),
        *norm(cross + "ln_1_kv.{w}", f"{ours}/norm_context"),
        *_cross_attention(cross + "attn.", f"{ours}/attention", joint=True),
        *norm(cross + "ln_2.{w}", f"{ours}/norm2"),
        *linear(cross + "mlp.c_fc.{w}", f"{ours}/mlp/up", "d f -> f d"),
        *linear(cross + "mlp.c_proj.{w}", f"{ours}/mlp/down", "f d -> d f"),
        *norm("text_decoder.ln_final.{w}", "decoder/norm"),
        row("text_decoder.text_projection", "decoder/output/kernel", "v d -> d v"),
    ]


def configs(
    model: Model, special: dict[str, int | None], resize: str, clean: Clean = "none", dtype: Precision = "float32"
) -> dict[str, Any]:
    """open_clip_config.json, which says nothing of `dtype`: open_clip computes in float32 unless it is told otherwise.
    It takes the tokenizer's files from the folder, whatever `hf_tokenizer_name` says."""
    image, text = model.image, model.text
    if image.pool == "map":
        project = "none" if image.embed_dim is None else "linear"
        vision_cfg: dict[str, Any] = dict(
            timm_model_name=trunk(image), timm_model_pretrained=False, timm_pool="map", timm_proj=project
        )
    else:
        shape = dict(layers=image.depth, width=image.width, head_width=image.width // image.heads, patch_size=image.patch_size)
        vision_cfg = dict(**shape, **_kwargs(image), no_ln_pre=not image.pre_norm)
        if image.pool == "single":
            vision_cfg |= dict(attentional_pool=True, attn_pooler_queries=image.queries, attn_pooler_heads=image.pool_heads)
        elif image.pool == "avg":
            vision_cfg |= dict(pool_type="avg", final_ln_after_pool=image.norm_pooled)
    text_cfg: dict[str, Any] = dict(
        **dict(context_length=text.length, vocab_size=text.vocab_size, hf_tokenizer_name="in-this-folder"),
        **dict(width=text.width, heads=text.heads, layers=text.depth, no_causal_mask=not text.causal, **_kwargs(text)),
        **dict(pool_type=POOLS[text.pool], pad_id=special["pad"], eos_id=special["eos"]),
        **dict(proj_type="none" if text.embed_dim is None else "linear", proj_bias=text.projection_bias),
    )
    if clean == "canonicalize":  # else open_clip does what `web` does
        text_cfg["tokenizer_kwargs"] = dict(clean=clean)
    if text.pool == "cls":  # the mask finds padding by this id
        text_cfg |= dict(embed_cls=True, pad_id=0)
    vision_cfg["image_size"] = image.image_size
    config: dict[str, Any] = dict(embed_dim=model.embed_dim, vision_cfg=vision_cfg, text_cfg=text_cfg)
    if text.activation == "quick_gelu":
        config["quick_gelu"] = True
    if custom(model):
        config["custom_text"] = True
    if (head := model.decoder) is not None:
        vision_cfg["output_tokens"] = text_cfg["output_tokens"] = True
        same = {name: text_cfg[name] for name in ("context_length", "vocab_size", "width")}
        config["multimodal_cfg"] = dict(
            **same, heads=head.heads, layers=head.depth, attn_pooler_heads=image.pool_heads, mlp_ratio=4
        )
    if model.init_bias is not None:
        config["init_logit_bias"] = model.init_bias
    mode = {"squash": "squash", "crop": "shortest"}[resize]
    preprocess = dict(size=image.image_size, mean=image.mean, std=image.std, interpolation="bicubic", resize_mode=mode)
    return {"open_clip_config.json": dict(model_cfg=config, preprocess_cfg=preprocess)}


def _kwargs(tower: ImageTower | TextTower) -> dict[str, Any]:
    """The fields of both native towers. open_clip multiplies the width by `mlp_ratio` and truncates."""
    ratio = tower.mlp_dim / tower.width
    if int(tower.width * ratio) != tower.mlp_dim:
        ratio = (tower.mlp_dim + 0.5) / tower.width
    tanh = dict(act_kwargs=dict(approximate="tanh")) if tower.activation == "gelu_tanh" else {}
    return dict(mlp_ratio=ratio, norm_kwargs=dict(eps=tower.norm_eps), **tanh)
