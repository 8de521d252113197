"""The files that sentence-transformers 5.4 and later reads beside transformers' own, as its `Transformer.save` names them.

Without them it opens the folder as well, but pads texts to the longest of a batch: SigLIP's text tower sees padding, so that its
vectors would be others.
"""

from typing import Any

from clipjax.config import Model

FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
MODULE = "sentence_transformers.base.modules.transformer.Transformer"


def configs(model: Model) -> dict[str, Any]:
    """The content of FILES. Its vectors are the towers' outputs before they are brought to unit norm."""
    methods = {part: dict(method=f"get_{part}_features", method_output_name="pooler_output") for part in ("text", "image")}
    transformer: dict[str, Any] = dict(
        **dict(transformer_task="feature-extraction", modality_config=methods, module_output_name="sentence_embedding"),
        processor_kwargs=dict(backend="pil"),  # resizes as clipjax does; torchvision differs by up to one level of 255
    )
    if not model.text.causal:
        transformer["processing_kwargs"] = dict(text=dict(padding="max_length", truncation=True))
    return {
        "modules.json": [dict(idx=0, name="0", path="", type=MODULE)],
        "sentence_bert_config.json": transformer,
        "config_sentence_transformers.json": dict(model_type="SentenceTransformer", similarity_fn_name="cosine"),
    }
