"""clipjax trains CLIP-style image-text models with JAX on TPU and GPU meshes."""
