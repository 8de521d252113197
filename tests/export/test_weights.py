"""Files of weights: in one piece or in shards, in half precision, pickled, and with another library's names."""

import json

import numpy as np
import pytest

from clipjax.config import ConfigError
from clipjax.export.formats import weights
from tests import torch_reference

torch_reference.load()
import safetensors.torch  # noqa: E402
import torch  # noqa: E402


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    drawn = {name: torch.randn(3, 2) for name in ("vision_model.a", "vision_model.b", "logit_scale")}
    return drawn | {"vision_model.b": drawn["vision_model.b"].bfloat16(), "logit_scale": drawn["logit_scale"].half()}


def same(got, tensors):
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert str(got[name].dtype) == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(np.float32(got[name]), tensor.float().numpy())


def sharded(folder, tensors):
    parts = {f"model-{i + 1:05}-of-{len(tensors):05}.safetensors": name for i, name in enumerate(tensors)}
    for file, name in parts.items():
        safetensors.torch.save_file({name: tensors[name]}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(metadata={}, weight_map={name: file for file, name in parts.items()})))
    return index


def test_safetensors(tmp_path, tensors):
    assert weights.find(tmp_path, ["model.safetensors"]) is None
    index = sharded(tmp_path, tensors)
    assert weights.find(tmp_path, ["other.safetensors", "model.safetensors"]) == index
    same(weights.read(index), tensors)
    whole = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, whole, {"format": "pt"})
    assert weights.find(tmp_path, ["model.safetensors"]) == whole
    same(weights.read(whole), tensors)
    whole.write_bytes(whole.read_bytes()[:40])
    with pytest.raises(ConfigError, match="is not a complete safetensors file"):
        weights.read(whole)
    safetensors.torch.save_file({"other": torch.zeros(1)}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(ConfigError, match=r"lack 1 of its tensors: vision_model\.b"):
        weights.read(index)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"names model-00002-of-00003\.safetensors, which is missing"):
        weights.read(index)
    index.write_text("[]")
    with pytest.raises(ConfigError, match="is no index of shards"):
        weights.read(index)


class Program:
    def __reduce__(self):
        return print, ("it ran",)


def test_pickled(tmp_path, tensors, capsys):
    """A state_dict, the checkpoint of a distributed training, and what is none."""
    torch.save(tensors, tmp_path / "a.bin")
    same(weights.read(tmp_path / "a.bin"), tensors)
    distributed = dict(epoch=3, name="run", state_dict={f"module.{name}": tensor for name, tensor in tensors.items()})
    torch.save(distributed, tmp_path / "epoch_3.pt")
    same(weights.read(tmp_path / "epoch_3.pt"), tensors)
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(dict(state_dict=tensors, more=Program()), tmp_path / "program.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "a.bin").read_bytes()[:500])
    for name, message in dict(list="holds no state_dict", program="weights_only=True", torn="can't read it").items():
        with pytest.raises(ConfigError, match=message) as error:
            weights.read(tmp_path / f"{name}.pt")
        assert len(str(error.value)) < 500
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("names", "found"),
    {
        ("visual.conv1.weight", "positional_embedding"): "open_clip",
        ("text_model.head.weight",): "transformers",
        ("params/img/pos_embedding", "params/t"): "big_vision",
    }.items(),
)
def test_another_librarys_names_are_told_in_a_line(tmp_path, names, found):
    for origin in weights.STARTS:
        if origin == found:
            weights.require_names(names, origin, tmp_path / "x")
            continue
        with pytest.raises(ConfigError, match=f"names of {found}, not those of {origin}: use --from {found}"):
            weights.require_names(names, origin, tmp_path / "x")
    weights.require_names(("a", "b"), "open_clip", tmp_path / "x")  # unknown ones are a matter of the table
