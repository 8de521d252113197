"""Makes a workdir from another library's model, for `clipjax eval`, `embed`, `caption`, `export`, and as the start of a run."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from clipjax.checkpoint import TOKENIZER, save_weights
from clipjax.config import Caption, Data, Run, Sigmoid, Softmax, TokenizerFile, require
from clipjax.data.tokenizer import Tokenizer
from clipjax.export.finetune import write_finetune
from clipjax.export.formats import big_vision_read, open_clip_read, transformers_read
from clipjax.export.found import Found, Options
from clipjax.files import resolve
from clipjax.models.clip import Params
from clipjax.train.workdir import save_config

LARGEST_SCALE = 100.0  # to which CLIP's scale is clamped in training; SigLIP's is not
ROUNDING = 1e-3  # log 100 in half precision is a little more or less
READERS: dict[str, Callable[[Path, Options], Found]] = {
    "open_clip": open_clip_read.read,
    "big_vision": big_vision_read.read,
    "transformers": transformers_read.read,
}

AS_IT_IS = Options()


def import_run(source: Path, out: Path, origin: str, options: Options = AS_IT_IS) -> tuple[Run, list[str]]:
    """Writes the workdir `out` from the weights of another library, with a checkpoint of step 0. Beside a model of both towers
    lies a configuration that fine-tunes it. `origin`: one of READERS.

    Returns its run, and notes on what is not imported. Raises ConfigError for a model that clipjax has not, for weights that do
    not fit it, for a source without tokenizer, and unless `out` is new or empty.
    """
    require_new(out)
    found = READERS[origin](source, options)
    sigmoid = found.model.init_bias is not None
    above = math.exp(float(found.params.get("log_scale", 0.0))) > LARGEST_SCALE * (1 + ROUNDING)
    # float32: the arithmetic of the original, also on CPUs, where bfloat16 would be slower and 1e-2 off.
    model = replace(found.model, dtype="float32", max_scale=None if sigmoid or above else LARGEST_SCALE)
    terms = (Sigmoid() if sigmoid else Softmax(), *([] if model.decoder is None else [Caption()]))
    clean = "none" if found.tokenizer is None else found.tokenizer.clean
    words = TokenizerFile(path=str(resolve(out) / TOKENIZER), clean=clean)
    run = Run(model=model, data=Data(spec="emoji", resize=found.resize), tokenizer=words, objective=terms)
    write_weights(run, found.params, found.tokenizer, out, f"clipjax import --from {origin}")
    if model.towers == "both":
        write_finetune(out)
    return run, found.notes


def require_new(out: Path) -> None:
    """Raises ConfigError unless `out` is new or empty."""
    require(not out.exists() or (out.is_dir() and not any(out.iterdir())), "--out", str(out), "is not empty: name a new folder")


def write_weights(run: Run, params: Params, tokenizer: Tokenizer | None, out: Path, made_by: str) -> None:
    """Writes the workdir `out`: a checkpoint of step 0 with weights alone, and the tokenizer. `made_by`: the command."""
    if tokenizer is not None:
        tokenizer.save(out / TOKENIZER)
    save_weights(out, run, params, made_by)
    save_config(run, out)  # last: a folder with a config.json is a workdir
