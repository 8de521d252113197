"""Folders of transformers' at small sizes, as its own classes write them, with random weights."""

import json
import shutil
from pathlib import Path

import numpy as np

from tests import torch_reference
from tests.export.models import LENGTH, TEXT

torch_reference.load()
import torch  # noqa: E402
import transformers  # noqa: E402

VISION = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=6)
WORDS = dict(hidden_size=20, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=LENGTH)


def clip(vision=None, text=None, **whole) -> transformers.CLIPModel:
    """With hidden sizes that differ from each other and from the projection; 32 pixels are no multiple of the patch."""
    text = WORDS | dict(vocab_size=TEXT["vocab_size"], eos_token_id=2) | (text or {})
    return made(transformers.CLIPModel, text_config=text, vision_config=VISION | (vision or {}), **dict(projection_dim=28) | whole)


def siglip(vision=None, text=None) -> transformers.SiglipModel:
    """The image's width is the embedding's, and the text tower has another."""
    text = WORDS | dict(vocab_size=TEXT["vocab_size"], projection_size=24, bos_token_id=0, eos_token_id=1) | (text or {})
    return made(transformers.SiglipModel, text_config=text, vision_config=VISION | (vision or {}))


def made(cls: type, **config) -> torch.nn.Module:
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


def written(folder: Path, model: torch.nn.Module, tokenizer: Path | None, processor=None, **save) -> Path:
    """As `save_pretrained` of the model, of its image processor, and a tokenizer.json that has no class of transformers'."""
    model.save_pretrained(folder, **save)
    kind = "CLIP" if "CLIP" in type(model).__name__ else "Siglip"
    cfg = getattr(model.config, "vision_config", model.config)
    if hasattr(cfg, "patch_size"):
        side = cfg.image_size
        sizes = dict(size=dict(shortest_edge=side), crop_size=dict(height=side, width=side))
        sizes = sizes if kind == "CLIP" else dict(size=dict(height=side, width=side))
        pil = getattr(transformers, f"{kind}ImageProcessorPil")
        pil(**sizes | (processor or {})).save_pretrained(folder)
    if tokenizer is not None:
        shutil.copy(tokenizer, folder / "tokenizer.json")
        named = dict(tokenizer_class="PreTrainedTokenizerFast", pad_token="<pad>", eos_token="<|endoftext|>")
        (folder / "tokenizer_config.json").write_text(json.dumps(named | dict(model_max_length=LENGTH)))
    return folder


def change(file: Path, *path: str, **fields: object) -> None:
    """Other fields in a section of a JSON file."""
    whole = json.loads(file.read_text())
    section = whole
    for name in path:
        section = section[name]
    section.update(fields)
    file.write_text(json.dumps(whole))


def embeddings(model: torch.nn.Module, pixels: np.ndarray | None, ids: np.ndarray | None) -> dict[str, np.ndarray]:
    """Unit vectors by tower. `pixels`: float32 [n, 3, s, s], normalised."""
    found = {}
    with torch.inference_mode():
        if pixels is not None:
            images = torch.from_numpy(pixels)
            tower = getattr(model, "vision_model", model)
            found["image"] = model.get_image_features(images) if hasattr(model, "get_image_features") else model(images)
            assert tower is not None
        if ids is not None:
            tokens = torch.from_numpy(ids).long()
            found["text"] = model.get_text_features(tokens) if hasattr(model, "get_text_features") else model(tokens)
    return {tower: unit(output, tower) for tower, output in found.items()}


def unit(output, tower: str) -> np.ndarray:
    """Of a class with projection the projected vector, else the pooled one."""
    embedded = getattr(output, f"{tower}_embeds", None)
    vectors = (output.pooler_output if embedded is None else embedded).numpy()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
