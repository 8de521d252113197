"""From a configuration to the things it describes. The only side effect is the tokenizer's file in the workdir."""

import functools
from pathlib import Path

import jax

from clipjax import config
from clipjax.checkpoint import TOKENIZER
from clipjax.data.pipeline import train_batches
from clipjax.data.sources import Source
from clipjax.data.tokenizer import Tokenizer
from clipjax.train.loop import Batches


def tokenizer(run: config.Run, workdir: Path, source: Source) -> Tokenizer:
    """The run's tokenizer: that of the workdir, or else a new one, trained or loaded as run.tokenizer says and saved there.

    Raises ConfigError where its ids do not fit the text tower.
    """
    text, saved = run.model.text, workdir / TOKENIZER
    if saved.exists():
        made = Tokenizer.load(saved, text.length)
    elif isinstance(run.tokenizer, config.TokenizerFile):
        made = Tokenizer.load(Path(run.tokenizer.path), text.length)
    else:
        made = Tokenizer.train(source.captions(), text.vocab_size, run.tokenizer.lowercase, text.length)
    enough = f"must be at least the tokenizer's {made.vocab_size}"
    config.require(made.vocab_size <= text.vocab_size, "model.text.vocab_size", text.vocab_size, enough)
    pools = text.pool != "eot" or made.end_id == made.vocab_size - 1
    remedy = f"needs an end token with the tokenizer's highest id, {made.vocab_size - 1}: this one's is {made.end_id}; use last"
    config.require(pools, "model.text.pool", text.pool, remedy)
    if not saved.exists() and jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        made.save(saved)
    return made


def batches(run: config.Run, source: Source, tokens: Tokenizer) -> Batches:
    """This process's training batches, to be opened at a step."""
    opened = functools.partial(
        train_batches,
        source,
        tokens,
        run.data,
        image_size=run.model.image.image_size,
        batch_size=run.train.batch_size,
        seed=run.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return lambda step: opened(start_step=step)
