"""Captions by open_clip's own `CoCa.generate`."""

from typing import Any

import numpy as np

from clipjax.data.tokenizer import Tokenizer


def greedy(model: Any, pixels: Any, words: Tokenizer) -> np.ndarray:
    """Greedy captions, ids [n, t]: start, text, end, padding. `pixels`: float32 [n, 3, s, s], normalised."""
    from open_clip import coca_model

    if not coca_model._has_transformers:
        _restore(coca_model)
    special = dict(sot_token_id=words.start_id, eos_token_id=words.end_id, pad_token_id=words.pad_id)
    length = dict(seq_len=words.length, max_seq_len=words.length, min_seq_len=0, fixed_output_length=True)
    return model.generate(pixels, generation_type="top_k", top_k=1, **length, **special).numpy()


def _restore(coca_model: Any) -> None:
    """open_clip 3.3 disables all of its generation if transformers has no BeamSearchScorer, as transformers 5. Only beam search
    needs it: this enables the rest."""
    from transformers import generation

    names = ("LogitsProcessorList", "TopPLogitsWarper", "TopKLogitsWarper", "RepetitionPenaltyLogitsProcessor")
    names += ("MinLengthLogitsProcessor", "MaxLengthCriteria", "StoppingCriteriaList")
    for name in names:
        setattr(coca_model, name, getattr(generation, name))
    coca_model.GENERATION_TYPES.update(top_k=coca_model.TopKLogitsWarper, top_p=coca_model.TopPLogitsWarper)
    coca_model._has_transformers = True
