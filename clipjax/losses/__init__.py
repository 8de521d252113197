"""Losses over the global batch: pure functions of unit vectors, scale, bias and the mesh axes they are spread over."""

from clipjax.losses.objective import objective
from clipjax.losses.sigmoid import siglip_loss
from clipjax.losses.softmax import accuracies, clip_loss

__all__ = ["accuracies", "clip_loss", "objective", "siglip_loss"]
