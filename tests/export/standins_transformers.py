"""Folders of transformers' at small sizes, as its own classes write them, with random weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tests import torch_reference
from tests.export.models import LENGTH, TEXT

torch_reference.load()
import torch  # noqa: E402
import transformers  # noqa: E402

VISION = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=6)
WORDS = dict(hidden_size=20, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=LENGTH)
WORDS |= dict(vocab_size=TEXT["vocab_size"])
SIGLIP = dict(projection_size=24, bos_token_id=0, eos_token_id=1)


def clip(vision=None, text=None, width=28) -> Any:
    """With hidden sizes that differ from each other and from the projection; 32 pixels are no multiple of the patch."""
    text, vision = WORDS | dict(eos_token_id=2) | (text or {}), VISION | (vision or {})
    return made(transformers.CLIPModel, text_config=text, vision_config=vision, projection_dim=width)


def siglip(vision=None, text=None) -> Any:
    """The image's width is the embedding's, and the text tower has another."""
    text, vision = WORDS | SIGLIP | (text or {}), VISION | (vision or {})
    return made(transformers.SiglipModel, text_config=text, vision_config=vision)


def made(cls: Any, **config: Any) -> Any:
    """A model with random weights: as after training, no bias is zero and no scale is one."""
    transformers.utils.logging.set_verbosity_error()  # of ids beyond a small vocabulary
    transformers.utils.logging.disable_progress_bar()
    model = cls(cls.config_class(**config)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            std = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            centre = 1.0 if norm else 4.0 if name == "logit_scale" else 0.0
            parameter.copy_(centre + std * torch.randn(parameter.shape, generator=generator))
    return model


def written(folder: Path, model: Any, tokenizer: Path | None, **save: Any) -> Path:
    """As `save_pretrained` of the model and of its image processor writes it, and a tokenizer of no class of transformers'."""
    model.save_pretrained(folder, **save)
    cfg = getattr(model.config, "vision_config", model.config)
    if hasattr(cfg, "patch_size"):
        square = dict(height=cfg.image_size, width=cfg.image_size)
        if model.config.model_type.startswith("siglip"):
            processor = transformers.SiglipImageProcessorPil(size=square)
        else:
            processor = transformers.CLIPImageProcessorPil(size=dict(shortest_edge=cfg.image_size), crop_size=square)
        processor.save_pretrained(folder)
    if tokenizer is not None:
        shutil.copy(tokenizer, folder / "tokenizer.json")
        settings = dict(tokenizer_class="PreTrainedTokenizerFast", pad_token="<pad>", model_max_length=LENGTH)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def change(file: Path, *path: str, **fields: object) -> None:
    """Other fields in a section of a JSON file; those that are ... are removed."""
    whole = json.loads(file.read_text())
    section = whole
    for name in path:
        section = section[name]
    section.update(fields)
    for name in [name for name, value in section.items() if value is ...]:
        del section[name]
    file.write_text(json.dumps(whole))


def embeddings(model: Any, pixels: np.ndarray | None, ids: np.ndarray | None) -> dict[str, np.ndarray]:
    """Unit vectors by tower. `pixels`: float32 [n, 3, s, s], normalised; None: the model has no such tower."""
    found = {}
    with torch.inference_mode():
        if pixels is not None:
            images = torch.from_numpy(pixels)
            found["image"] = model.get_image_features(images) if hasattr(model, "get_image_features") else model(images)
        if ids is not None:
            tokens = torch.from_numpy(ids).long()
            found["text"] = model.get_text_features(tokens) if hasattr(model, "get_text_features") else model(tokens)
    return {tower: _unit(output, tower) for tower, output in found.items()}


def _unit(output: Any, tower: str) -> np.ndarray:
    """Of a class with projection the projected vector, else the pooled one."""
    embedded = getattr(output, f"{tower}_embeds", None)
    vectors = (output.pooler_output if embedded is None else embedded).numpy()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
