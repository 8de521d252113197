"""The tables of names: the meaning of a row, and what is refused."""

import re

import numpy as np
import pytest

from clipjax.config import SIZES, ConfigError, ImageTower, Model, TextTower
from clipjax.export.formats import open_clip, transformers
from clipjax.export.formats.table import Row, Table, flatten, row, to_ours, to_theirs, unflatten
from clipjax.models.clip import init
from tests import torch_reference

torch_reference.load()
import timm  # noqa: E402
import torch  # noqa: E402

TINY = dict(width=8, depth=2, heads=2, mlp_dim=12)


@pytest.fixture(scope="module")
def clip():
    image = ImageTower(image_size=8, patch_size=4, embed_dim=6, **TINY)
    model = Model(image=image, text=TextTower(length=5, vocab_size=11, embed_dim=6, **TINY))
    return model, init(model, 0)


@pytest.fixture(scope="module")
def siglip():
    image = ImageTower.siglip("B/4", image_size=8, **TINY)
    text = TextTower.siglip("B", length=5, vocab_size=11, embed_dim=8, projection_bias=False, **TINY)
    model = Model(image=image, text=text)
    return model, init(model, 0)


def test_tables_say_what_torch_means(clip):
    model, params = clip
    native = to_theirs(open_clip.table(model), params)
    blocks = params["image"]["blocks"]
    qkv = np.asarray(blocks["attention"]["qkv"]["kernel"])[1]  # d 3 h k of layer 1
    query, key, value = (qkv[:, s].reshape(8, 8).T for s in range(3))
    np.testing.assert_array_equal(
        native["visual.transformer.resblocks.1.attn.in_proj_weight"], np.concatenate([query, key, value])
    )
    hf = to_theirs(transformers.table(model), params)
    np.testing.assert_array_equal(hf["vision_model.encoder.layers.1.self_attn.v_proj.weight"], value)
    out = np.asarray(blocks["attention"]["out"]["kernel"])[0].reshape(8, 8).T
    np.testing.assert_array_equal(hf["vision_model.encoder.layers.0.self_attn.out_proj.weight"], out)
    patch = np.asarray(params["image"]["patch"]["kernel"]).transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(native["visual.conv1.weight"], patch)
    assert native["logit_scale"].shape == ()
    assert all(t.dtype == np.float32 and t.flags["C_CONTIGUOUS"] for t in (native | hf).values())


def test_siglip_head_joins_query_key_value(siglip):
    model, params = siglip
    tensors = to_theirs(transformers.table(model), params)
    head = params["image"]["map"]
    query, pair = (np.asarray(head[name]["kernel"]) for name in ("query", "key_value"))
    want = np.concatenate([query.reshape(8, 8).T, pair[:, 0].reshape(8, 8).T, pair[:, 1].reshape(8, 8).T])
    np.testing.assert_array_equal(tensors["vision_model.head.attention.in_proj_weight"], want)
    assert not tensors["logit_bias"].any()
    assert not tensors["text_model.head.bias"].any()


def test_there_and_back(clip, siglip):
    for model, params in (clip, siglip):
        leaves = dict(flatten(params))
        back = dict(flatten(to_ours(transformers.table(model), to_theirs(transformers.table(model), params), params)))
        assert back.keys() == leaves.keys()
        assert all(np.array_equal(back[path], leaves[path]) for path in leaves)


def test_export_lists_every_parameter_left_out(clip):
    model, params = clip
    leaves = dict(flatten(params))
    del leaves["image/norm/bias"], leaves["text/tokens"]
    leaves |= {"image/extra/kernel": np.zeros(3), "image/blocks/gate": np.zeros((2, 8))}
    with pytest.raises(ConfigError) as error:
        to_theirs(open_clip.table(model), unflatten(leaves))
    assert re.search("2 without a row in the table: image/blocks/gate, image/extra/kernel", str(error.value))
    assert re.search("2 missing from the model: image/norm/bias, text/tokens", str(error.value))


def test_import_lists_every_tensor_left_out(siglip):
    model, params = siglip
    tensors = to_theirs(transformers.table(model), params)
    tensors["vision_model.encoder.layers.2.layer_norm1.bias"] = np.zeros(8)  # a third layer
    tensors["logit_bias"] = np.full(1, -10.0)  # which our model has not
    del tensors["text_model.encoder.layers.1.mlp.fc2.bias"], tensors["logit_scale"]
    with pytest.raises(ConfigError) as error:
        to_ours(transformers.table(model), tensors, params)
    message = str(error.value)
    assert "2 with nothing for them in the model: logit_bias, vision_model.encoder.layers.2.layer_norm1.bias" in message
    assert "2 missing from the weights: logit_scale, text_model.encoder.layers.1.mlp.fc2.bias" in message


def test_import_refuses_other_shapes(clip):
    model, params = clip
    tensors = to_theirs(transformers.table(model), params)
    tensors["vision_model.embeddings.position_embedding.weight"] = np.zeros((10, 8))
    tensors["text_model.encoder.layers.1.mlp.fc1.weight"] = np.zeros((8, 12))  # transposed: as many numbers
    with pytest.raises(ConfigError, match=r"fc1\.weight \(8, 12\), vision_model.*position_embedding\.weight \(10, 8\)"):
        to_ours(transformers.table(model), tensors, params)


def test_import_refuses_a_table_for_another_model(clip):
    _, params = clip
    table = Table((row("a", "image/a", "d -> d"), Row(("b.{i}",), (("image/b", "d -> d"),))))
    with pytest.raises(ConfigError, match="of the table that the model has not: image/a, image/b"):
        to_ours(table, {}, params)


@pytest.mark.parametrize(("key", "name"), open_clip.TRUNKS.items(), ids=open_clip.TRUNKS.values())
def test_trunks_are_what_timm_calls_so(key, name):
    size, patch, side, activation = key
    with torch.device("meta"):
        trunk = timm.create_model(name)
    block = trunk.blocks[0]
    assert (trunk.embed_dim, len(trunk.blocks), block.mlp.fc1.out_features, block.attn.num_heads) == SIZES[size]
    assert trunk.patch_embed.img_size == (side, side)
    assert trunk.patch_embed.patch_size == (patch, patch)
    tanh = [type(m.act).__name__ == "GELUTanh" for m in (block.mlp, trunk.attn_pool.mlp)]
    assert tanh == [activation == "gelu_tanh"] * 2
    assert {m.eps for m in trunk.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    image = ImageTower.siglip(f"{size}/{patch}", image_size=side, activation=activation)
    assert open_clip.trunk(image) == name
