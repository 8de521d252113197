"""clipjax trains CLIP-style image-text models with JAX on TPU and GPU meshes."""

__version__ = "0.1.0"
