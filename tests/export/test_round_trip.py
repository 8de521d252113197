"""original -> import -> export in the original's dtype: its tensors bit for bit, its token ids and its preprocessing."""

import json

import numpy as np
import pytest
import safetensors
import safetensors.torch

from clipjax import cli
from clipjax.data.clean import clean
from clipjax.export.folder import export
from clipjax.export.formats.table import to_theirs
from tests.export import standins_transformers as standins
from tests.export.models import clip as our_clip
from tests.export.models import coca, parameters
from tests.export.standins_transformers import torch, written
from tests.web import WEB

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TEXTS = [clean(text, "none") for text in WEB] + ["a photo of a cat.", "Two dogs!", "“it’s”", "more words than fit " * 9]


def tensors(folder):
    """Name -> kind, shape and bytes of each tensor of a folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in safetensors.deserialize(file.read_bytes()):
            found[name] = (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
    return found


def there_and_back(folder, to, dtype):
    """The folder of an export of an import."""
    run, out = folder.with_name("run"), folder.with_name("out")
    assert cli.main(["import", "--from", to, str(folder), "--out", str(run)]) == 0
    assert cli.main(["export", str(run), "--to", to, "--out", str(out), "--dtype", dtype]) == 0
    return out


@pytest.mark.parametrize(("kind", "dtype"), [("clip", "float16"), ("siglip", "bfloat16"), ("clip", "float32")])
def test_transformers(tmp_path, tokenizer, kind, dtype):
    model = getattr(standins, kind)()
    with torch.no_grad():  # numbers that arithmetic may flush to zero, or lose the sign of
        model.text_model.final_layer_norm.bias[:3] = torch.tensor([6e-8, -0.0, 1e-39])
    folder = written(tmp_path / "theirs", model.to(TYPES[dtype]), tokenizer)
    out = there_and_back(folder, "transformers", dtype)
    assert tensors(out) == tensors(folder)
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    loaded = standins.transformers.AutoModel.from_pretrained(out)
    assert loaded.dtype == TYPES[dtype]
    for part in ("vision_config", "text_config"):
        theirs, ours = (getattr(m.config, part).to_dict() for m in (model, loaded))
        same = theirs.keys() & ours.keys() - {"bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path", "dtype"}
        same -= {"projection_dim"}  # of a whole model the one beside the sections counts
        assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    theirs, ours = (standins.transformers.AutoImageProcessor.from_pretrained(f, backend="pil") for f in (folder, out))
    for name in ("size", "resample", "rescale_factor", "image_mean", "image_std", "do_resize", "do_normalize", "do_rescale"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert bool(ours.do_center_crop) == bool(theirs.do_center_crop)
    assert not theirs.do_center_crop or ours.crop_size == theirs.crop_size
    words = [standins.transformers.AutoTokenizer.from_pretrained(f) for f in (folder, out)]
    theirs, ours = (w(TEXTS, padding="max_length", truncation=True, return_tensors="np")["input_ids"] for w in words)
    plain = [i for i, text in enumerate(TEXTS) if "<" not in text]  # the strings of special tokens are text to clipjax
    assert len(plain) > 100
    np.testing.assert_array_equal(ours[plain], theirs[plain])


@pytest.mark.parametrize(("model", "dtype"), [(our_clip(), "bfloat16"), (coca(init_bias=-10.0), "float16")], ids=["CLIP", "CoCa"])
def test_open_clip(tmp_path, tokenizer, model, dtype):
    import open_clip

    folder = tmp_path / "theirs"
    export(model, parameters(model), tokenizer, "crop", folder, "open_clip")  # for its configuration; the weights are open_clip's
    cfg = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    custom = cfg.pop("custom_text", False)
    theirs = (open_clip.CoCa if custom else open_clip.CLIP)(**cfg).to(TYPES[dtype])
    state = {name: torch.nan_to_num(tensor, 0.25, 0.25, 0.25) for name, tensor in theirs.state_dict().items()}
    safetensors.torch.save_file(state, folder / "open_clip_model.safetensors", {"format": "pt"})
    out = there_and_back(folder, "open_clip", dtype)
    assert tensors(out) == tensors(folder)
    before, after = (json.loads((f / "open_clip_config.json").read_text()) for f in (folder, out))
    assert after == before
    ids = [open_clip.get_tokenizer(f"local-dir:{f}")(TEXTS) for f in (folder, out)]
    differ = [text for text, *pair in zip(TEXTS, *ids, strict=True) if not torch.equal(*pair)]
    assert differ == ["a\x81b"]  # which `web` removes, and open_clip keeps: no character of Windows-1252


def test_what_half_precision_cannot_hold_is_refused():
    from clipjax.config import ConfigError
    from clipjax.export.formats import open_clip

    model = our_clip()
    params = parameters(model)
    params["log_scale"] = np.float32(1e5)
    assert to_theirs(open_clip.table(model), params, "bfloat16")["logit_scale"] == 99840
    with pytest.raises(ConfigError, match=r"--dtype = 'float16': logit_scale holds 1e\+05, which is more than it can hold"):
        to_theirs(open_clip.table(model), params, "float16")
