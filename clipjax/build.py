"""From a configuration to the things it describes. The only side effect is the tokenizer's file in the workdir, once it is known
that the run is not another's."""

import functools
from pathlib import Path

import jax

from clipjax import config, distributed
from clipjax.checkpoint import TOKENIZER
from clipjax.data.pipeline import check_source, train_batches
from clipjax.data.source import Source
from clipjax.data.teacher import Teacher
from clipjax.data.tokenizer import Tokenizer
from clipjax.train.loop import Batches
from clipjax.train.resume import resumable


def tokenizer(run: config.Run, workdir: Path, source: Source) -> Tokenizer:
    """The run's tokenizer: that of the workdir where the run goes on from a checkpoint, else a new one, trained or loaded as
    run.tokenizer says and saved there.

    Raises ConfigError where the workdir's checkpoint is another run's, the source is too small (`pipeline.check_source`) or has
    not the number of examples that a term remembers, or the ids do not fit the text tower.
    """
    resumes = resumable(run, workdir) is not None
    check_source(source, run.data, run.train.batch_size)
    for i, term in enumerate(run.objective):
        if isinstance(term, config.Sogclr | config.Isogclr):
            remedy = f"must be the number of examples of {source.name}, {len(source)}"
            config.require(term.examples == len(source), f"objective.{i}.examples", term.examples, remedy)
    with distributed.first_process_first("tokenizer"):  # the first trains it and saves it, the others load it
        return _tokenizer(run, workdir, source, resumes)


def _tokenizer(run: config.Run, workdir: Path, source: Source, resumes: bool) -> Tokenizer:
    text, saved, there = run.model.text, workdir / TOKENIZER, resumes or jax.process_index() > 0
    if there:
        remedy = f"has checkpoints but no {TOKENIZER}: put it back" if resumes else "must be on storage that all processes share"
        config.require(saved.exists(), "--workdir", str(workdir), remedy)
        made = Tokenizer.load(saved, text.length)
    elif isinstance(run.tokenizer, config.TokenizerFile):
        made = Tokenizer.load(run.tokenizer.path, text.length)
    else:
        made = Tokenizer.train(source.captions(), text.vocab_size, run.tokenizer.lowercase, text.length)
    enough = f"must be at least the tokenizer's {made.vocab_size}"
    config.require(made.vocab_size <= text.vocab_size, "model.text.vocab_size", text.vocab_size, enough)
    ends = text.pool == "last" or made.end_id == made.vocab_size - 1
    remedy = f"needs an end token with the tokenizer's highest id, {made.vocab_size - 1}: this one's is {made.end_id}; use last"
    config.require(ends, "model.text.pool", text.pool, remedy)
    if run.model.decoder is not None:
        remedy = f"model.decoder begins a caption with its start token and ends it with its highest id, {made.vocab_size - 1}"
        writes = made.start_id is not None and made.end_id == made.vocab_size - 1
        config.require(writes, "tokenizer", [made.start_id, made.end_id], remedy)
    if not there:
        made.save(saved)
    return made


def teacher(run: config.Run, source: Source) -> Teacher | None:
    """The embeddings that run.data.teacher names, None where it names none. Raises ConfigError where they are of other data."""
    return None if run.data.teacher is None else Teacher(run.data.teacher, source)


def batches(run: config.Run, source: Source, tokens: Tokenizer, taught: Teacher | None = None) -> Batches:
    """This process's training batches, to be opened at a step. `taught`: the run's teacher, where it has been opened."""
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
        teacher=taught,
    )
    return lambda step: opened(start_step=step)
