"""A model of one tower: what another library's image or text tower alone becomes."""

import jax
import numpy as np
import pytest

import clipjax
from clipjax import cli
from clipjax.config import ConfigError, Data, Decoder, ImageTower, Model, Run, TextTower, TokenizerFile, Train
from clipjax.data.tokenizer import Tokenizer
from clipjax.export.imported import write_weights
from clipjax.models.clip import bind, init

SHAPE = dict(width=16, depth=1, heads=2, mlp_dim=24)
TEXTS = ["red heart", "flag"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two workdirs, each of a tower; their widths differ. And the model that they are of, with its embeddings."""
    out = tmp_path_factory.mktemp("runs")
    words = Tokenizer.train(TEXTS * 3, 300, True, 8)
    words.save(out / "tokenizer.json")
    tower = dict(image=ImageTower(image_size=16, patch_size=8, embed_dim=12, **SHAPE))
    tower["text"] = TextTower(length=8, vocab_size=300, embed_dim=12, **SHAPE)
    params = jax.device_get(init(Model(**tower), 0))
    for name in ("image", "text"):
        model = Model(towers=name, dtype="float32", **{name: tower[name]})
        shapes = jax.eval_shape(lambda model=model: init(model, 0))
        assert shapes.keys() == {name}  # and no scale
        run = Run(model=model, data=Data(spec="emoji"), tokenizer=TokenizerFile(path="tokenizer.json"))
        write_weights(run, {name: params[name]}, None if name == "image" else words, out / name, "a test")
    return out, bind(Model(dtype="float32", **tower), params)


def test_its_embeddings_are_those_of_the_whole_model(runs):
    out, whole = runs
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    image, text = clipjax.load(out / "image"), clipjax.load(out / "text")
    np.testing.assert_allclose(image.encode_image(list(pixels)), whole.encode_image(pixels), atol=1e-6)
    ids = text.tokenizer.encode(TEXTS)[0]
    np.testing.assert_allclose(text.encode_text(TEXTS), whole.encode_text(ids), atol=1e-6)
    with pytest.raises(ConfigError, match=r"model.towers = 'image': there is no text tower; .* init.image"):
        image.encode_text(TEXTS)
    with pytest.raises(ConfigError, match=r"model.towers = 'text': there is no image tower"):
        text.encode_image(list(pixels))


def test_commands(runs, tmp_path, capsys):
    """`embed` writes what it has, training needs both, and no file appears where it is refused."""
    out, _ = runs
    for name in ("image", "text"):
        file = tmp_path / f"{name}.npz"
        assert cli.main(["embed", str(out / name), "--data", "emoji", "--split", "test#0-1", "--out", str(file)]) == 0
        with np.load(file) as arrays:
            assert arrays.keys() == {name, "key"}
            assert arrays[name].shape == (len(arrays["key"]), 12)
    assert cli.main(["eval", "retrieval", str(out / "image"), "--data", "emoji", "--split", "test#0-1"]) == 2
    assert "there is no text tower" in capsys.readouterr().err
    probe = ["--train", "test#1-10", "--label-pattern", "dark", "--methods", "fewshot"]  # which reads no text
    assert cli.main(["eval", "probe", str(out / "image"), "--data", "emoji", "--split", "test#10-15", *probe]) == 0
    assert '"fewshot_acc1@1": 1.0' in capsys.readouterr().out  # of one class
    (tmp_path / "c.py").write_text(
        "from clipjax.config import *\n"
        "def config() -> Run:\n"
        "    return Run(data=Data(spec='emoji'), model=Model(towers='image'))\n"
    )
    assert cli.main(["train", str(tmp_path / "c.py"), "--workdir", str(tmp_path / "new")]) == 2
    assert "model.towers = 'image': there is no text tower" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_configuration():
    """The other tower's fields mean nothing; a decoder needs both."""
    assert Model(towers="text", text=TextTower(embed_dim=8), image=ImageTower(embed_dim=4)).embed_dim == 8
    with pytest.raises(ConfigError, match=r"model.decoder needs both"):
        Model(towers="text", decoder=Decoder(heads=8))
    assert Run(model=Model(towers="image"), data=Data(spec="emoji"), train=Train(steps=9000)).model.towers == "image"
