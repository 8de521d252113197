"""Folders of transformers' as runs: the embeddings of its own classes, and a line for what clipjax has not."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import safetensors.torch

import clipjax
from clipjax import cli
from clipjax.config import ConfigError, ImageTower, TextTower
from clipjax.export.formats import transformers_read
from clipjax.export.found import Found, Options
from clipjax.models.clip import bind
from tests.export.models import CAPTIONS, LENGTH, TEXT
from tests.export.standins_transformers import SIGLIP, VISION, WORDS, change, clip, embeddings, made, siglip, torch, written
from tests.export.standins_transformers import transformers as theirs

IDS = np.random.default_rng(1).integers(3, 300, (4, LENGTH))
END = 123
IDS[:, 0], IDS[[0, 1, 2], [4, 9, 15]] = 1, END
HIGHEST = TEXT["vocab_size"] - 1


def read(folder, **options) -> Found:
    return transformers_read.read(folder, Options(**options))


def check_embeddings(model, found: Found, ids: np.ndarray) -> None:
    """Ours, in float32, equal those of the model in PyTorch to 1e-5, from pixels and ids."""
    ours = replace(found.model, dtype="float32")
    side, mean, std = ours.image.image_size, np.float32(ours.image.mean), np.float32(ours.image.std)
    raw = np.random.default_rng(0).integers(0, 256, (4, side, side, 3), np.uint8)
    pixels = ((np.float32(raw) / 255 - mean) / std).transpose(0, 3, 1, 2).copy()
    given = pixels if ours.towers != "text" else None, ids if ours.towers != "image" else None
    wanted, bound = embeddings(model, *given), bind(ours, found.params)
    assert wanted.keys() == ({"image", "text"} if ours.towers == "both" else {ours.towers})
    with jax.default_matmul_precision("highest"):
        got = {tower: bound.encode_image(raw) if tower == "image" else bound.encode_text(ids) for tower in wanted}
    for tower, vectors in got.items():
        assert np.linalg.norm(np.asarray(vectors) - wanted[tower], axis=1).max() < 1e-5, tower


def test_clip(tmp_path, tokenizer, images):
    """In float16 and in shards, with quick_gelu in one tower; from files and strings to embeddings."""
    model = clip(dict(hidden_act="quick_gelu"), dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-4)).half()
    folder = written(tmp_path / "theirs", model, tokenizer, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert cli.main(["import", "--from", "transformers", str(folder), "--out", str(tmp_path / "run")]) == 0
    loaded = clipjax.load(tmp_path / "run")
    ours = loaded.run.model
    assert replace(ours.image, mean=ImageTower.mean, std=ImageTower.std) == ImageTower(
        **dict(image_size=32, patch_size=6, width=24, depth=3, heads=4, mlp_dim=40, embed_dim=28, activation="quick_gelu")
    )
    shape = dict(width=20, depth=2, heads=2, mlp_dim=36, vocab_size=TEXT["vocab_size"], embed_dim=28, length=LENGTH)
    assert ours.text == TextTower(**shape, norm_eps=1e-4, activation="gelu_tanh")
    assert (loaded.run.data.resize, ours.init_bias, ours.towers, ours.dtype) == ("crop", None, "both", "float32")
    model = model.float()
    check_embeddings(model, Found(ours, jax.device_get(loaded.params), None, "crop", []), IDS)
    words = theirs.AutoTokenizer.from_pretrained(folder)
    ids = words(CAPTIONS, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
    even = [image.resize((48, 40)) for image in images]  # no margin is odd, which transformers rounds differently
    pixels = theirs.AutoImageProcessor.from_pretrained(folder, backend="pil")(even, return_tensors="np")["pixel_values"]
    wanted = embeddings(model, pixels, ids)
    assert np.linalg.norm(loaded.encode_image(even) - wanted["image"], axis=1).max() < 1e-5
    assert np.linalg.norm(loaded.encode_text(CAPTIONS) - wanted["text"], axis=1).max() < 1e-5


def test_siglip(tmp_path, tokenizer):
    """In bfloat16, with scale and bias of shape [1] or []; another length than any published one."""
    model = siglip(text=dict(hidden_act="gelu")).bfloat16()
    folder = written(tmp_path / "theirs", model, tokenizer)
    found = read(folder)
    check_embeddings(model.float(), found, IDS)
    assert (found.resize, found.notes, found.model.text.length, found.model.text.pool) == ("squash", [], LENGTH, "last")
    assert (found.model.image.activation, found.model.text.activation) == ("gelu_tanh", "gelu")
    assert (found.model.image.mean, found.model.embed_dim, found.model.text.width) == ((0.5, 0.5, 0.5), 24, 20)
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    scalars = {name: tensors[name].reshape(()) for name in ("logit_scale", "logit_bias")}
    buffers = {f"{part}.embeddings.position_ids": torch.arange(9)[None] for part in ("vision_model", "text_model")}
    safetensors.torch.save_file(tensors | scalars | buffers, file)
    again = read(folder)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, found.params))
    assert found.params["bias"] == np.float32(model.logit_bias.item())


@pytest.mark.parametrize(("end", "pool"), [(2, "eot"), (END, "eos"), (HIGHEST, "eot")])
def test_the_end_token(tmp_path, tokenizer, monkeypatch, end, pool):
    """2 means the highest id; another one is looked for, and is the first of that id."""
    model = clip(text=dict(eos_token_id=end, num_hidden_layers=1))
    folder = written(tmp_path / "theirs", model, tokenizer)
    if end == END:
        with pytest.raises(ConfigError, match="pools at the first token with the id 123; its tokenizer's end token"):
            read(folder)
    monkeypatch.setattr(transformers_read, "check_tokenizer", lambda *_: None)
    found = read(folder)
    assert found.model.text.pool == pool
    assert found.model.text.eos_id == (END if pool == "eos" else TextTower.eos_id)
    ids = IDS[:3].copy()
    ids[:, 10] = end if end == HIGHEST else ids[:, 10]
    check_embeddings(model, found, ids)


def test_metaclip_2_has_no_exception_for_2(tmp_path, tokenizer, monkeypatch):
    cls = theirs.MetaClip2Model
    small = dict(text_config=WORDS | dict(eos_token_id=2), vision_config=VISION | dict(num_hidden_layers=1), projection_dim=8)
    model = made(cls, **small)
    folder = written(tmp_path / "theirs", model, tokenizer)
    monkeypatch.setattr(transformers_read, "check_tokenizer", lambda *_: None)
    found = read(folder)
    assert found.model.text.eos_id == 2
    check_embeddings(model, found, np.where(IDS == END, 2, IDS))


ALONE = {
    "CLIPVisionModelWithProjection": (VISION | dict(projection_dim=12), "image", 12),
    "CLIPVisionModel": (VISION | dict(projection_dim=12), "image", None),
    "CLIPTextModelWithProjection": (WORDS | dict(projection_dim=12, eos_token_id=2), "text", 12),
    "CLIPTextModel": (WORDS | dict(projection_dim=12, eos_token_id=2), "text", None),
    "SiglipVisionModel": (VISION, "image", None),
    "SiglipTextModel": (WORDS | SIGLIP, "text", 24),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_tower_alone(tmp_path, tokenizer, name):
    """With and without the prefix that transformers 4 gave the names."""
    config, tower, width = ALONE[name]
    model = made(getattr(theirs, name), **config | dict(num_hidden_layers=1))
    folder = written(tmp_path / "theirs", model, tokenizer if tower == "text" else None)
    found = read(folder)
    assert (found.model.towers, getattr(found.model, tower).embed_dim, found.notes) == (tower, width, [])
    assert (found.params.keys(), found.tokenizer is None) == ({tower}, tower == "image")
    check_embeddings(model, found, IDS)
    file, prefix = folder / "model.safetensors", {"image": "vision_model.", "text": "text_model."}[tower]
    tensors = safetensors.torch.load_file(file)
    known = ("vision_model.", "text_model.", "visual_projection.", "text_projection.")
    tensors = {key if key.startswith(known) else prefix + key: tensor for key, tensor in tensors.items()}
    safetensors.torch.save_file(tensors | {f"{prefix}embeddings.position_ids": torch.arange(3)}, file)
    again = read(folder)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, found.params))


def test_a_tower_of_a_whole_model(tmp_path, tokenizer):
    """A configuration of both with the weights of one, and of one with the weights of both; a run, and its workdir."""
    model = clip(dict(num_hidden_layers=1, projection_dim=28), dict(num_hidden_layers=1))
    folder = written(tmp_path / "theirs", model, tokenizer)
    file = folder / "model.safetensors"
    tensors, whole = safetensors.torch.load_file(file), read(folder)
    change(folder / "config.json", **json.loads((folder / "config.json").read_text())["vision_config"])
    image = read(folder)
    assert image.model.towers == "image"
    assert image.model.image == replace(whole.model.image, embed_dim=28)
    others = sum(not name.startswith(("vision_model.", "visual_projection.")) for name in tensors)
    assert image.notes == [f"the weights have {others} more tensors than the image tower, which is all that is read"]
    written(folder, model, tokenizer)
    safetensors.torch.save_file({name: t for name, t in tensors.items() if name.startswith("text_")}, file)
    assert cli.main(["import", "--from", "transformers", str(folder), "--out", str(tmp_path / "run")]) == 0
    run = clipjax.load(tmp_path / "run")
    assert run.run.model.towers == "text"
    assert jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(run.params)["text"], whole.params["text"]))
    with pytest.raises(ConfigError, match="there is no image tower"):
        run.encode_image([np.zeros((8, 8, 3), np.uint8)])


def test_older_configurations(tmp_path, tokenizer):
    """Sections named _dict go before the others, with the defaults of their class; sizes may be pairs."""
    model = clip(dict(image_size=30), dict(hidden_act="quick_gelu"))
    folder = written(tmp_path / "theirs", model, tokenizer)
    config, pixels = folder / "config.json", folder / "preprocessor_config.json"
    want = read(folder).model
    text = json.loads(config.read_text())["text_config"]
    given = {name: text[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    given |= dict(max_position_embeddings=LENGTH, vocab_size=TEXT["vocab_size"], eos_token_id=2)
    other = text | dict(hidden_act="gelu", num_hidden_layers=7)
    change(config, text_config_dict=given, vision_config_dict=None, text_config=other)
    change(config, "vision_config", image_size=[30, 30], patch_size=[6, 6], num_channels=...)
    assert read(folder).model == want
    processor = json.loads(pixels.read_text())
    pixels.write_text(json.dumps(dict(feature_extractor_type="CLIPFeatureExtractor", size=30, crop_size=30, do_normalize=True)))
    assert (read(folder).model, read(folder).resize) == (want, "crop")
    nested = dict(processor, size=dict(height=30, width=30), do_center_crop=False, image_mean=[0.1, 0.2, 0.3])
    (folder / "processor_config.json").write_text(json.dumps(dict(image_processor=nested)))
    assert (read(folder).model.image.mean, read(folder).resize) == ((0.1, 0.2, 0.3), "squash")
    (folder / "processor_config.json").unlink()
    pixels.unlink()
    assert (read(folder).model, read(folder).resize) == (want, "crop")
    assert read(folder).notes == ["it has no preprocessor_config.json: images are prepared as clip's are"]


def test_other_image_size(tmp_path, tokenizer):
    folder = written(tmp_path / "theirs", clip(), tokenizer)
    found = read(folder, image_size=50)
    assert found.model.image.image_size == 50
    assert found.params["image"]["positions"].shape == (65, 24)
    assert found.notes == ["the positions of 32 pixels: they are resized to 50, 26 -> 65"]
    np.testing.assert_array_equal(found.params["image"]["positions"][0], read(folder).params["image"]["positions"][0])


def test_a_model_of_the_hub(tmp_path, tokenizer, monkeypatch):
    """What huggingface_hub has in its cache, without the network."""
    written(tmp_path / "theirs", siglip(), tokenizer)
    cached = tmp_path / "hub" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    shutil.copytree(tmp_path / "theirs", cached / "snapshots" / "abc")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    from pathlib import Path

    assert read(Path("some/model")).model == read(tmp_path / "theirs").model
    with pytest.raises(ConfigError, match="SRC = 'some/other': is no folder here, and the Hugging Face hub did not give it"):
        read(Path("some/other"))
    with pytest.raises(ConfigError, match="SRC = 'nowhere': is neither a folder nor a model of the Hugging Face hub"):
        read(Path("nowhere"))


LETTERS = [chr(c) for c in (*range(65, 91), *range(97, 123))]
GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", ".", ",", *LETTERS]
MERGES = [("▁", "c"), ("▁c", "a"), ("▁ca", "t"), ("p", "h"), ("t", "o")]


@pytest.mark.parametrize("name", ["Siglip2Tokenizer", "GemmaTokenizer"])
def test_siglip_2(tmp_path, capsys, name):
    """Its own tokenizer's ids, in lower case also where transformers' class does not do that; `--verify` finds no difference."""
    vocabulary = {token: i for i, token in enumerate([*GEMMA, *map("".join, MERGES)])}
    marks = dict(padding_side="right", add_bos_token=False, add_eos_token=True, model_max_length=LENGTH)
    words = getattr(theirs, name)(vocab=vocabulary, merges=MERGES, **marks)
    words.save_pretrained(tmp_path / "theirs")
    written(tmp_path / "theirs", siglip(), None)
    source = ["import", "--from", "transformers", str(tmp_path / "theirs"), "--out", str(tmp_path / "run")]
    assert cli.main([*source, "--verify"]) == 0, capsys.readouterr()
    run = clipjax.load(tmp_path / "run")
    assert (run.run.tokenizer.clean, run.tokenizer.pad_id, run.tokenizer.start_id) == ("lower", 0, None)
    texts = ["a photo of a cat.", "Two DOGS,  a café; 猫", "a cat " * 9, ""]
    small = [text.lower() for text in texts]
    ids = words(small, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(run.tokenizer.encode(texts)[0], ids)


def test_an_image_tower_alone_is_verified(tmp_path, capsys):
    folder = written(tmp_path / "theirs", made(theirs.CLIPVisionModelWithProjection, **VISION | dict(projection_dim=8)), None)
    assert cli.main(["import", "--from", "transformers", str(folder), "--out", str(tmp_path / "run"), "--verify"]) == 0
    assert "same pixels or ids: image" in capsys.readouterr().out


REFUSED = {
    "naflex": (lambda f: change(f / "config.json", model_type="siglip2"), "model_type = 'siglip2': needs patches of any number"),
    "bert": (
        lambda f: change(f / "config.json", model_type="bert"),
        "model_type = 'bert': of transformers' models clipjax has clip,",
    ),
    "classifier": (
        lambda f: change(f / "config.json", architectures=["CLIPForImageClassification"]),
        "clipjax has no classifier",
    ),
    "quantized": (lambda f: change(f / "config.json", quantization_config=dict(bits=4)), "quantization_config = {'bits': 4}"),
    "activation": (lambda f: change(f / "config.json", "text_config", hidden_act="relu"), "text_config.hidden_act = 'relu'"),
    "end": (
        lambda f: change(f / "config.json", "text_config", eos_token_id=49407),
        "eos_token_id = 49407: must be the id of the end",
    ),
    "channels": (lambda f: change(f / "config.json", "vision_config", num_channels=1), "vision_config.num_channels = 1"),
    "not square": (
        lambda f: change(f / "config.json", "vision_config", image_size=[32, 64]),
        r"image_size = \[32, 64\]: .*square",
    ),
    "wider": (
        lambda f: change(f / "config.json", projection_dim=99),
        r"of another shape than the model's: text_projection.weight",
    ),
    "nearest": (
        lambda f: change(f / "preprocessor_config.json", resample=0),
        "preprocessor_config.json: resample = 0: must be 3",
    ),
    "margin": (lambda f: change(f / "preprocessor_config.json", size=dict(shortest_edge=40)), "size = {'shortest_edge': 40}"),
    "no crop": (lambda f: change(f / "preprocessor_config.json", do_center_crop=False), "clipjax crops what it resizes"),
    "processor": (lambda f: change(f / "preprocessor_config.json", image_processor_type="X"), "image_processor_type = 'X'"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer: a tokenizer.json, spiece.model"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights as model.safetensors or pytorch_model.bin"),
    "no config": (lambda f: (f / "config.json").rename(f / "open_clip_config.json"), "no config.json.*use --from open_clip"),
    "torn config": (lambda f: (f / "config.json").write_text("{"), "is no JSON object"),
    "other names": (lambda f: renamed(f / "model.safetensors"), "have the names of open_clip, not those of transformers"),
}


def renamed(file) -> None:
    safetensors.torch.save_file({f"visual.{name}": t for name, t in safetensors.torch.load_file(file).items()}, file)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    return written(tmp_path_factory.mktemp("whole") / "theirs", clip(dict(num_hidden_layers=1)), tokenizer)


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_what_clipjax_has_not(tmp_path, whole, capsys, spoil, message):
    """In a line, and without a workdir."""
    shutil.copytree(whole, tmp_path / "src")
    spoil(tmp_path / "src")
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path / "src")
    assert len(str(error.value)) < 500
    assert cli.main(["import", "--from", "transformers", str(tmp_path / "src"), "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()
