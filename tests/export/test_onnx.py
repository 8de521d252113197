"""The ONNX recipe of docs/export.md, run as it stands there on exported folders, and its model in ONNX Runtime."""

import re
from pathlib import Path

import numpy as np
import pytest

from clipjax.data.images.image import fit
from clipjax.data.tokenizer import Tokenizer
from clipjax.export.compare.reference import load
from clipjax.export.compare.verify import encode
from clipjax.export.folder import export
from tests import torch_reference
from tests.export.models import CAPTIONS, LENGTH, clip, parameters, siglip

torch_reference.load()

DOCS = Path(__file__).parents[2] / "docs/export.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's exporter warns of its own parts
@pytest.mark.parametrize("model", [clip(), siglip(dict(activation="gelu_tanh"))], ids=["CLIP", "SigLIP"])
def test_the_recipe(tmp_path, tokenizer, images, monkeypatch, model):
    import onnxruntime

    params, size = parameters(model), model.image.image_size
    export(model, params, tokenizer, "squash", tmp_path / "out", "transformers")
    recipe = DOCS.read_text().split("## ONNX")[1].split("```python\n")[1].split("```")[0]
    recipe, changed = re.subn(
        r"^folder, length, size = .*$", f'folder, length, size = "out", {LENGTH}, {size}', recipe, flags=re.M
    )
    assert changed == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(recipe, str(DOCS), "exec"), {})
    session = onnxruntime.InferenceSession("towers.onnx", providers=["CPUExecutionProvider"])
    pixels = np.stack([fit(image, size, "squash") for image in images])
    tokens = Tokenizer.load(tokenizer, LENGTH).encode(CAPTIONS)[0]
    ours = encode(model, params, pixels, tokens)
    given = load(tmp_path / "out", "transformers").pixels(images).numpy()
    for rows in (slice(0, 5), slice(0, 1)):  # other batches than the two of the recipe
        image, text = session.run(["image", "text"], dict(pixel_values=given[rows], input_ids=np.int64(tokens[rows])))
        assert np.linalg.norm(image - ours.image[rows], axis=1).max() < 1e-5
        assert np.linalg.norm(text - ours.text[rows], axis=1).max() < 1e-5
