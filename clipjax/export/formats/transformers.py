"""transformers' layout of CLIPModel and SiglipModel."""

from typing import Any

from clipjax.config import Clean, ImageTower, Model, TextTower, require
from clipjax.export.formats.table import BlockNames, Precision, Row, Table, blocks, joined, linear, norm, row

WEIGHTS = "model.safetensors"
QKV = tuple(f"self_attn.{part}_proj.{{w}}" for part in "qkv")
NAMES = BlockNames("layer_norm1.{w}", QKV, "self_attn.out_proj.{w}", "layer_norm2.{w}", "mlp.fc1.{w}", "mlp.fc2.{w}")
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}


def refuse(model: Model) -> None:
    """Raises ConfigError, with the reason, if the model is neither a CLIPModel nor a SiglipModel."""
    image, text = model.image, model.text
    require(model.decoder is None, "model.decoder", model.decoder, "transformers has no CoCa; use --to open_clip")
    remedy = "neither CLIPModel nor SiglipModel has CoCa's poolers; use --to open_clip"
    require(not image.attentional, "model.image.pool", image.pool, remedy)
    averages = image.pool in ("mean", "avg")
    require(not averages, "model.image.pool", image.pool, "neither CLIPModel nor SiglipModel averages the patches")
    siglip = image.pool == "map"
    name = "SiglipModel" if siglip else "CLIPModel"
    has = {True: f"{name} has one", False: f"{name} has none"}
    require(image.pre_norm != siglip, "model.image.pre_norm", image.pre_norm, has[not siglip])
    require(image.patch_bias == siglip, "model.image.patch_bias", image.patch_bias, has[siglip])
    remedy = f"{name}'s image tower {'does not project' if siglip else 'projects'}"
    require((image.embed_dim is None) == siglip, "model.image.embed_dim", image.embed_dim, remedy)
    require(text.embed_dim is not None, "model.text.embed_dim", None, f"{name}'s text tower projects")
    require(not image.projection_bias, "model.image.projection_bias", True, f"{name} has none")
    require(siglip or not text.projection_bias, "model.text.projection_bias", True, "CLIPModel has none")
    require(text.causal != siglip, "model.text.causal", text.causal, f"{name}'s text tower is {'not ' if siglip else ''}causal")
    pools = ("last",) if siglip else ("eot", "eos")
    require(text.pool in pools, "model.text.pool", text.pool, f"{name} pools at {pools[0]!r}")
    remedy = "CLIPModel takes 2 to mean the highest id; use --to open_clip"
    require(text.pool != "eos" or text.eos_id != 2, "model.text.eos_id", text.eos_id, remedy)
    require(siglip or model.init_bias is None, "model.init_bias", model.init_bias, "CLIPModel has no bias; use --to open_clip")


def table(model: Model) -> Table:
    """Every tensor of the model, with its name in transformers. A tower alone has the names that it has in a whole model."""
    siglip = model.text.pool == "last" if model.towers == "text" else model.image.pool == "map"
    head = _siglip_head(model) if siglip else _clip_head(model)
    text = [
        row("text_model.embeddings.token_embedding.weight", "text/tokens", "v d -> v d"),
        row("text_model.embeddings.position_embedding.weight", "text/positions", "t d -> t d"),
        *blocks(NAMES, "text_model.encoder.layers.{i}.", "text/blocks"),
        *norm("text_model.final_layer_norm.{w}", "text/norm"),
    ]
    image = [
        *linear("vision_model.embeddings.patch_embedding.{w}", "image/patch", "p q c d -> d c p q", bias=siglip),
        row("vision_model.embeddings.position_embedding.weight", "image/positions", "n d -> n d"),
        *blocks(NAMES, "vision_model.encoder.layers.{i}.", "image/blocks"),
        *norm("vision_model.post_layernorm.{w}", "image/norm"),
    ]
    rows = (*text, *image, *head)
    if model.towers != "both":
        return Table(tuple(r for r in rows if r.paths[0].startswith(f"{model.towers}/")))
    zeros = {}
    if siglip and not model.text.projection_bias:
        zeros["text_model.head.bias"] = (model.embed_dim,)
    if siglip and model.init_bias is None:
        zeros["logit_bias"] = (1,)
    return Table(rows, zeros)


def _clip_head(model: Model) -> list[Row]:
    text = linear("text_projection.{w}", "text/projection", "d e -> e d", bias=False)
    image = linear("visual_projection.{w}", "image/projection", "d e -> e d", bias=False)
    return [
        row("logit_scale", "log_scale", " -> "),
        *(text if model.text.embed_dim is not None else []),
        *(image if model.image.embed_dim is not None else []),
        *norm("vision_model.pre_layrnorm.{w}", "image/pre_norm"),  # sic
        row("vision_model.embeddings.class_embedding", "image/class_token", "d -> d"),
    ]


def _siglip_head(model: Model) -> list[Row]:
    theirs, ours = "vision_model.head.", "image/map"
    attention = ((f"{ours}/query", "d h k -> (h k) d"), (f"{ours}/key_value", "d s h k -> (s h k) d"))
    return [
        row("logit_scale", "log_scale", " -> 1"),
        *([] if model.init_bias is None else [row("logit_bias", "bias", " -> 1")]),
        *linear("text_model.head.{w}", "text/projection", "d e -> e d", bias=model.text.projection_bias),
        row(theirs + "probe", f"{ours}/probe", "d -> 1 1 d"),
        *joined((theirs + "attention.in_proj_{w}",), attention),
        *linear(theirs + "attention.out_proj.{w}", f"{ours}/out", "h k d -> d (h k)"),
        *norm(theirs + "layernorm.{w}", f"{ours}/norm"),
        *linear(theirs + "mlp.fc1.{w}", f"{ours}/mlp/up", "d f -> f d"),
        *linear(theirs + "mlp.fc2.{w}", f"{ours}/mlp/down", "f d -> d f"),
    ]


def configs(
    model: Model, special: dict[str, int | None], resize: str, clean: Clean = "none", dtype: Precision = "float32"
) -> dict[str, Any]:
    """config.json and preprocessor_config.json. The tokenizer.json has the cleaning."""
    image, text, siglip = model.image, model.text, model.image.pool == "map"
    kind, name = ("siglip", "Siglip") if siglip else ("clip", "CLIP")
    ids = {f"{role}_token_id": special[role] for role in ("bos", "eos", "pad")}
    text_config = dict(vocab_size=text.vocab_size, max_position_embeddings=text.length, **ids, **_tower(text))
    vision_config = dict(image_size=image.image_size, patch_size=image.patch_size, **_tower(image))
    config: dict[str, Any] = dict(architectures=[f"{name}Model"], model_type=kind, dtype=dtype)
    config |= dict(text_config=text_config, vision_config=vision_config)
    if siglip:
        text_config["projection_size"] = model.embed_dim
    else:
        config["projection_dim"] = text_config["projection_dim"] = vision_config["projection_dim"] = model.embed_dim
    side, crop = dict(height=image.image_size, width=image.image_size), resize == "crop"
    pixels = dict(
        **dict(image_processor_type=f"{name}ImageProcessor", processor_class=f"{name}Processor", do_convert_rgb=True),
        **dict(do_resize=True, size=dict(shortest_edge=image.image_size) if crop else side, resample=3),  # 3: bicubic
        **dict(do_center_crop=crop, crop_size=side, do_rescale=True, rescale_factor=1 / 255),
        **dict(do_normalize=True, image_mean=image.mean, image_std=image.std),
    )
    return {"config.json": config, "preprocessor_config.json": pixels}


def _tower(tower: ImageTower | TextTower) -> dict[str, Any]:
    shape = dict(hidden_size=tower.width, num_hidden_layers=tower.depth, num_attention_heads=tower.heads)
    activation = ACTIVATIONS[tower.activation]
    return dict(**shape, intermediate_size=tower.mlp_dim, hidden_act=activation, layer_norm_eps=tower.norm_eps)
