"""What people have of open_clip's: folders that it loads itself, from files and strings to embeddings equal to its own."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tokenizers
from tokenizers import models, pre_tokenizers, processors

import clipjax
from clipjax.config import ConfigError
from clipjax.export.compare.verify import compare, load
from clipjax.export.formats.open_clip_read import CONFIG
from clipjax.export.found import Options
from clipjax.export.imported import import_run
from tests import torch_reference

torch_reference.load()
import open_clip  # noqa: E402
import torch  # noqa: E402

TEXTS = ["Two dogs!", "A Photo of a cat.", "flag &amp; heart", "\u201ccurly\u201d   quotes", "red " * 90]
VISION = dict(image_size=32, layers=2, width=48, head_width=16, patch_size=8)
WORDS = dict(context_length=20, width=32, heads=2, layers=2)
OWN = WORDS | dict(vocab_size=49408)
POOLER = dict(attentional_pool=True, attn_pooler_heads=8, attn_pooler_queries=5)
HF = dict(vocab_size=60, hf_tokenizer_name="some/words")


def words_of(folder: Path, end: str, pad: str) -> None:
    """A tokenizer whose end token has neither the highest id nor the padding's."""
    names = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz!.&'", '"']
    names = names if pad == "<pad>" else ["<pad>", "<s>", "</s>", *names[3:]]
    backend = tokenizers.Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    marks = [(name, names.index(name)) for name in ("<s>", end)]
    backend.post_processor = processors.TemplateProcessing(single=f"<s> $A {end}", special_tokens=marks)
    backend.add_special_tokens([name for name in names if len(name) > 1])
    backend.save(str(folder / "tokenizer.json"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", pad_token="<pad>", eos_token=end, sep_token=end, bos_token="<s>")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


MODELS = {
    "CLIP without a tokenizer, 36 px of patches of 8": (
        open_clip.CLIP,
        dict(embed_dim=24, quick_gelu=True, vision_cfg=VISION | dict(image_size=36), text_cfg=OWN),
        None,
    ),
    "CoCa without a tokenizer": (
        open_clip.CoCa,
        dict(
            embed_dim=32,
            custom_text=True,
            vision_cfg=VISION | POOLER | dict(output_tokens=True),
            text_cfg=OWN | dict(embed_cls=True, output_tokens=True),
            multimodal_cfg=OWN | dict(layers=1),
        ),
        None,
    ),
    "MetaCLIP 2": (
        open_clip.CLIP,
        dict(embed_dim=24, vision_cfg=VISION, text_cfg=WORDS | HF | dict(pool_type="eos", eos_id=2)),
        "<pad>",
    ),
    "CLIPA": (
        open_clip.CLIP,
        dict(
            embed_dim=24,
            vision_cfg=VISION | dict(pool_type="avg", final_ln_after_pool=True, no_ln_pre=True),
            text_cfg=WORDS
            | HF
            | dict(pool_type="last", no_causal_mask=True, tokenizer_kwargs=dict(strip_sep_token=True, clean="lower")),
        ),
        "first",
    ),
}


def folder_of(path: Path, kind: type, cfg: dict, pad: str | None) -> Path:
    """As on the hub: its configuration, its weights in PyTorch's form as a run on several devices leaves them."""
    path.mkdir()
    torch.manual_seed(0)
    model = kind(**{name: value for name, value in cfg.items() if name != "custom_text"})
    for name, parameter in model.named_parameters():
        if parameter.ndim and not name.endswith("positional_embedding"):
            torch.nn.init.normal_(parameter, 1.0 if "ln" in name and name.endswith("weight") else 0.0, 0.1)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 1e-3}}, path / "open_clip_pytorch_model.bin")
    pixels = dict(mean=(0.5, 0.4, 0.3), resize_mode="squash", size=224)  # a size that open_clip does not read
    (path / CONFIG).write_text(json.dumps(dict(model_cfg=cfg, preprocess_cfg=pixels)))
    if pad is not None:
        words_of(path, "</s>", pad)
    return path


@pytest.mark.parametrize(("kind", "cfg", "pad"), MODELS.values(), ids=MODELS.keys())
def test_embeddings_equal_open_clips(tmp_path, images, kind, cfg, pad):
    folder = folder_of(tmp_path / "theirs", kind, cfg, pad)
    run, notes = import_run(folder, tmp_path / "run", "open_clip")
    assert len(notes) == 1
    assert "preprocess_cfg.size" in notes[0]
    loaded, theirs = clipjax.load(tmp_path / "run"), load(folder, "open_clip")._replace(generate=None)
    np.testing.assert_array_equal(loaded.tokenizer.encode(TEXTS)[0], theirs.ids(TEXTS))
    report = compare(theirs, run.model, loaded.params, loaded.tokenizer, run.data.resize, images, TEXTS)
    assert max(report.image, report.text, report.token_logits or 0) < 1e-5
    assert report.failures == []


def clip_folder(path: Path) -> Path:
    return folder_of(path, *MODELS["MetaCLIP 2"])


def change(folder: Path, part: str, **fields: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config["model_cfg"][part].update(fields)
    (folder / CONFIG).write_text(json.dumps(config))


def test_another_size_than_the_weights(tmp_path, images):
    """By the configuration, as open_clip does; by --image-size as its `force_image_size`."""
    folder = clip_folder(tmp_path / "theirs")
    by_option, notes = import_run(folder, tmp_path / "option", "open_clip", Options(image_size=70))
    assert by_option.model.image.image_size == 70
    change(folder, "vision_cfg", image_size=70)
    change(folder, "text_cfg", context_length=31)
    run, more = import_run(folder, tmp_path / "run", "open_clip")
    assert notes == ["image positions: 17 -> 65, resized for 70 px (bicubic, antialias)"]
    assert [*notes, "text positions: 20 -> 31, interpolated"] == more[1:]
    loaded = clipjax.load(tmp_path / "run")
    report = compare(load(folder, "open_clip"), run.model, loaded.params, loaded.tokenizer, "squash", images, TEXTS)
    assert max(report.image, report.text) < 1e-5
    assert report.failures == []


def test_what_is_no_weight_is_left_out(tmp_path):
    """Buffers of old checkpoints, a scale of one value in a row, and a file by its name."""
    folder = clip_folder(tmp_path / "theirs")
    whole, _ = import_run(folder, tmp_path / "whole", "open_clip")
    file = folder / "open_clip_pytorch_model.bin"
    state = torch.load(file, weights_only=True)["state_dict"]
    state |= {"module.attn_mask": torch.zeros(3, 3), "module.input_resolution": torch.tensor(32)}
    state["module.logit_scale"] = state["module.logit_scale"][None]
    file.unlink()
    torch.save(state, folder / "epoch_1.pt")
    again, _ = import_run(folder, tmp_path / "again", "open_clip")
    assert again.model == whole.model
    one, two = (clipjax.load(tmp_path / name).params for name in ("whole", "again"))
    np.testing.assert_array_equal(one["log_scale"], two["log_scale"])
    (folder / "epoch_2.pt").write_bytes((folder / "epoch_1.pt").read_bytes())
    with pytest.raises(ConfigError, match=r"several files of weights: name one of epoch_1\.pt, epoch_2\.pt"):
        import_run(folder, tmp_path / "two", "open_clip")
    import_run(folder / "epoch_2.pt", tmp_path / "two", "open_clip")
    for path in folder.glob("epoch*"):
        path.unlink()
    safetensors.torch.save_file({"vision_model.post_layernorm.weight": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"names of transformers, .*--from transformers$") as refused:
        import_run(folder, tmp_path / "three", "open_clip")
    assert len(str(refused.value)) < 300
