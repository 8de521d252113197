"""Makes a workdir from another library's model, for `clipjax eval`, `embed`, `caption` and `export`."""

from pathlib import Path

import jax
import numpy as np

from clipjax import sharding
from clipjax.checkpoint import TOKENIZER, Checkpoints
from clipjax.config import Caption, Data, Mesh, Run, Sigmoid, Softmax, TokenizerFile, require
from clipjax.data.tokenizer import Tokenizer
from clipjax.export import open_clip, open_clip_read
from clipjax.export.table import to_ours
from clipjax.models.clip import init
from clipjax.train.optimizer import make_optimizer
from clipjax.train.state import TrainState, abstract_state
from clipjax.train.workdir import save_config


def import_open_clip(source: Path, out: Path) -> tuple[Run, list[str]]:
    """Writes the workdir `out` from a folder of open_clip's, with a checkpoint of step 0.

    Returns its run, and notes on what is not imported. Raises ConfigError for a model that clipjax has not, for weights that do
    not fit it, for a folder without tokenizer, and unless `out` is new or empty.
    """
    require(not out.exists() or (out.is_dir() and not any(out.iterdir())), "--out", str(out), "is not empty: name a new folder")
    found = open_clip_read.read(source)
    model, words = found.model, _tokenizer(source, found.model)
    shapes = jax.eval_shape(lambda: init(model, 0))
    params = to_ours(open_clip.table(model), found.tensors, shapes)
    terms = (Softmax() if model.init_bias is None else Sigmoid(), *([] if model.decoder is None else [Caption()]))
    tokenizer = TokenizerFile(path=str((source / TOKENIZER).resolve()), clean=found.clean)
    run = Run(model=model, data=Data(spec="emoji", resize=found.resize), tokenizer=tokenizer, objective=terms)
    tx = make_optimizer(run.optim, run.train.steps, shapes)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(run, tx, sharding.make_mesh(Mesh())))
    placed = jax.tree.map(jax.device_put, params, shardings.params)
    opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(placed)
    state = TrainState(jax.device_put(np.int32(0), shardings.step), placed, opt_state, None)
    words.save(out / TOKENIZER)
    with Checkpoints(out, run) as checkpoints:
        checkpoints.save(0, state)
    save_config(run, out)  # last: a folder with a config.json is a workdir
    return run, found.notes


def _tokenizer(source: Path, model: open_clip.Model) -> Tokenizer:
    remedy = "has no tokenizer.json, which open_clip does not write for its own tokenizer: add one. CLIP's is that of"
    remedy += " openai/clip-vit-base-patch32 on the Hugging Face hub"
    require((source / TOKENIZER).is_file(), "SRC", str(source), remedy)
    words = Tokenizer.load(source / TOKENIZER, model.text.length)
    remedy = f"its weights have {model.text.vocab_size} tokens, and its tokenizer.json {words.vocab_size}"
    require(words.vocab_size <= model.text.vocab_size, "SRC", str(source), remedy)
    highest = words.vocab_size - 1
    by_id = model.text.pool == "eot" or model.decoder is not None
    remedy = f"its tokenizer's end token must have the highest id, {highest}, and has {words.end_id}: texts end there"
    require(not by_id or words.end_id == highest, "SRC", str(source), remedy)
    return words
