"""big_vision's layout of a two-tower model (google-research/big_vision models/proj/image_text/two_towers.py), layers stacked.

The axes of its kernels are those of ours: inputs first, then heads and the width of a head.
"""

from clipjax.config import ImageTower, Model, TextTower
from clipjax.export.formats.table import Row, Table, row


def table(model: Model) -> Table:
    """Every array of the model, by its name in big_vision."""
    both = [*_text(model.text), row("t", "log_scale", " -> 1")] if model.towers == "both" else []
    bias = [] if model.init_bias is None else [row("b", "bias", " -> 1")]
    return Table((*_image(model.image), *both, *bias))


def _image(tower: ImageTower) -> list[Row]:
    rows = [*_linear("img/embedding", "image/patch", "p q c d", "d"), *_encoder("img/Transformer", "image")]
    if tower.positions == "learned":
        rows.append(row("img/pos_embedding", "image/positions", "n d -> 1 n d"))
    if tower.class_token:
        rows.append(row("img/cls", "image/class_token", "d -> 1 1 d"))
    if tower.pool == "map":
        rows += _map_head("img/MAPHead_0", "image/map")
    return rows + _head("img/head", "image/projection", tower)


def _text(tower: TextTower) -> list[Row]:
    return [
        _same("txt/Embed_0/embedding", "text/tokens", "v d"),
        row("txt/pos_embedding", "text/positions", "t d -> 1 t d"),
        *_encoder("txt/Encoder_0", "text"),
        *_head("txt/head", "text/projection", tower),
    ]


def _head(theirs: str, ours: str, tower: ImageTower | TextTower) -> list[Row]:
    return [] if tower.embed_dim is None else _linear(theirs, ours, "d e", "e" if tower.projection_bias else "")


def _encoder(theirs: str, tower: str) -> list[Row]:
    layer, ours = f"{theirs}/encoderblock", f"{tower}/blocks"
    attention = f"{layer}/MultiHeadDotProductAttention_0"
    qkv = ("query", "key", "value")
    return [
        *_norm(f"{layer}/LayerNorm_0", f"{ours}/norm1", "l d"),
        _joined(attention, qkv, f"{ours}/attention/qkv", "kernel", "l d s h k -> (s l) d h k"),
        _joined(attention, qkv, f"{ours}/attention/qkv", "bias", "l s h k -> (s l) h k"),
        *_linear(f"{attention}/out", f"{ours}/attention/out", "l h k d", "l d"),
        *_norm(f"{layer}/LayerNorm_1", f"{ours}/norm2", "l d"),
        *_linear(f"{layer}/MlpBlock_0/Dense_0", f"{ours}/mlp/up", "l d f", "l f"),
        *_linear(f"{layer}/MlpBlock_0/Dense_1", f"{ours}/mlp/down", "l f d", "l d"),
        *_norm(f"{theirs}/encoder_norm", f"{tower}/norm", "d"),
    ]


def _map_head(theirs: str, ours: str) -> list[Row]:
    attention, key_value = f"{theirs}/MultiHeadDotProductAttention_0", ("key", "value")
    return [
        row(f"{theirs}/probe", f"{ours}/probe", "d -> 1 1 d"),
        *_linear(f"{attention}/query", f"{ours}/query", "d h k", "h k"),
        _joined(attention, key_value, f"{ours}/key_value", "kernel", "d s h k -> (s d) h k"),
        _joined(attention, key_value, f"{ours}/key_value", "bias", "s h k -> (s h) k"),
        *_linear(f"{attention}/out", f"{ours}/out", "h k d", "d"),
        *_norm(f"{theirs}/LayerNorm_0", f"{ours}/norm", "d"),
        *_linear(f"{theirs}/MlpBlock_0/Dense_0", f"{ours}/mlp/up", "d f", "f"),
        *_linear(f"{theirs}/MlpBlock_0/Dense_1", f"{ours}/mlp/down", "f d", "d"),
    ]


def _same(theirs: str, ours: str, axes: str) -> Row:
    return row(theirs, ours, f"{axes} -> {axes}")


def _norm(theirs: str, ours: str, axes: str) -> list[Row]:
    return [_same(f"{theirs}/{part}", f"{ours}/{part}", axes) for part in ("scale", "bias")]


def _linear(theirs: str, ours: str, kernel: str, bias: str) -> list[Row]:
    """`kernel`, `bias`: their axes; an empty `bias`: it has none."""
    parts = {"kernel": kernel, "bias": bias}
    return [_same(f"{theirs}/{part}", f"{ours}/{part}", axes) for part, axes in parts.items() if axes]


def _joined(theirs: str, names: tuple[str, ...], ours: str, part: str, pattern: str) -> Row:
    """Maps of the same input, which ours keeps in one with an axis `s`. `part`: kernel or bias."""
    return Row(tuple(f"{theirs}/{name}/{part}" for name in names), ((f"{ours}/{part}", pattern),))
