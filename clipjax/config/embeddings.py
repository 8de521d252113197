"""What may be trained where data.embeddings stand for a tower."""

from clipjax.config.augment import Augment
from clipjax.config.data import Data, Filter
from clipjax.config.fields import require
from clipjax.config.model import Model


def check_embeddings(model: Model, data: Data) -> None:
    """Raises ConfigError where data.embeddings can't stand for a tower: it is trained, or its input changes by visit."""
    if (file := data.embeddings) is None:
        return
    frozen = [name for name in ("image", "text") if getattr(model, name).unlock == 0]
    remedy = "stands for a tower that is wholly frozen: set model.image.unlock = 0 (or model.text.unlock = 0)"
    require(len(frozen) > 0, "data.embeddings", file, remedy)
    require(len(frozen) < 2, "data.embeddings", file, "with both towers frozen there is nothing left to train")
    require(model.decoder is None, "data.embeddings", file, "model.decoder needs what both towers compute: leave one out")
    require(not model.heads, "data.embeddings", file, "model.heads need what the towers compute: leave one out")
    if frozen == ["text"]:
        k, copies = data.captions_per_image, data.text_augment.count
        remedy = "data.embeddings have the main caption of each image alone"
        require(k == 1, "data.captions_per_image", k, f"{remedy}: use 1")
        require(data.captions in ((), (0,)), "data.captions", data.captions, f"{remedy}: leave it out")
        require(copies == 0, "data.text_augment.count", copies, f"{remedy}: use 0")
        return
    require(not data.views, "data.views", len(data.views), "data.embeddings are of whole images: leave them out")
    for part in data.parts:
        augments = part.augment != Augment()
        require(not augments, "data.augment", part.augment, "data.embeddings are of whole images: leave one out")
        plain = part.filter.min_side == Filter().min_side and part.filter.max_aspect is None
        require(plain, "data.filter", part.filter, "min_side and max_aspect need images, and with data.embeddings none is read")
    dropout = model.image.patch_dropout
    require(dropout == 0, "model.image.patch_dropout", dropout, "data.embeddings are of whole images: leave one out")
