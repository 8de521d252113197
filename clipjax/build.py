"""From a run's configuration to its tokenizer, teacher and batches.

Writes one file only: the tokenizer, in a workdir that `open_workdir` has checked.
"""

import functools

import jax

from clipjax import config, distributed
from clipjax.checkpoint import TOKENIZER
from clipjax.config.objective import check_teacher
from clipjax.data import reading
from clipjax.data.pipeline import check_source, train_batches
from clipjax.data.source import Source
from clipjax.data.tokenizer import Tokenizer
from clipjax.data.vectors import EMBEDDED, LABELS, Vectors
from clipjax.train.loop import Batches
from clipjax.train.origin import Origin
from clipjax.train.weights import Weights
from clipjax.train.workdir import Workdir

NOT_SHARED = "must be on storage that all processes share"


def tokenizer(run: config.Run, workdir: Workdir, source: Source) -> Tokenizer:
    """The run's tokenizer. A run that resumes loads that of its workdir. A new one saves it there; it has that of the run that it
    starts from, or trains or loads it, as run.tokenizer says.

    Raises ConfigError if the source is too small (`pipeline.check_source`), if a term that stores values of every example expects
    another number of examples, and if the ids do not fit the text tower.
    """
    check_source(source, run.data, run.train.batch_size)
    for i, term in enumerate(run.objective):
        if isinstance(term, config.Remembering):
            remedy = f"must be the number of examples of {source.name}, {len(source)}"
            config.require(term.examples == len(source), f"objective.{i}.examples", term.examples, remedy)
    with distributed.first_process_first("tokenizer"):  # the first process trains and saves it, the others load it
        file, resumes = workdir.path / TOKENIZER, workdir.saved is not None
        if resumes or jax.process_index() > 0:
            missing = f"has checkpoints but no {TOKENIZER}: put it back"
            config.require(file.exists(), "--workdir", str(workdir.path), missing if resumes else NOT_SHARED)
            loaded = Tokenizer.load(file, run.model.text.length, run.tokenizer.clean)
            _check_ids(run, loaded)
            return loaded
        new = _new_tokenizer(run, workdir.origin, source)
        _check_ids(run, new)  # before it is saved: a configuration that is refused leaves no workdir
        new.save(file)
        return new


def _new_tokenizer(run: config.Run, origin: Origin | Weights | None, source: Source) -> Tokenizer:
    text, how = run.model.text, run.tokenizer.clean
    if origin is not None and origin.tokenizer is not None:
        file = origin.tokenizer / TOKENIZER
        config.require(file.exists(), "init.run", str(origin), f"its workdir has no {TOKENIZER}: put it back, as {file}")
        return Tokenizer.load(file, text.length, how)
    if isinstance(run.tokenizer, config.TokenizerFile):
        return Tokenizer.load(run.tokenizer.path, text.length, how)
    captions = source.captions(reading.texts(source))  # in the first process only
    return Tokenizer.train(captions, text.vocab_size, run.tokenizer.lowercase, text.length, how)


def _check_ids(run: config.Run, tokenizer: Tokenizer) -> None:
    """Raises ConfigError where the tokenizer's ids do not fit the text tower or the captioning head."""
    text, highest = run.model.text, tokenizer.vocab_size - 1
    remedy = f"must be at least the tokenizer's {tokenizer.vocab_size}"
    config.require(tokenizer.vocab_size <= text.vocab_size, "model.text.vocab_size", text.vocab_size, remedy)
    remedy = f"must be the id of the tokenizer's end token, {tokenizer.end_id}"
    config.require(text.pool != "eos" or text.eos_id == tokenizer.end_id, "model.text.eos_id", text.eos_id, remedy)
    has_end = text.pool in ("eos", "last") or tokenizer.end_id == highest
    remedy = f"needs an end token with the tokenizer's highest id, {highest}: this one's is {tokenizer.end_id}; use last"
    config.require(has_end, "model.text.pool", text.pool, remedy)
    if run.model.decoder is not None:
        remedy = f"model.decoder begins a caption with its start token and ends it with its highest id, {highest}"
        fits = tokenizer.start_id is not None and tokenizer.end_id == highest
        config.require(fits, "tokenizer", [tokenizer.start_id, tokenizer.end_id], remedy)


def teacher(run: config.Run, source: Source) -> Vectors | None:
    """The teacher's embeddings, which run.data.teacher names; None if it names none. Raises ConfigError if they belong to other
    data, or have another width than a term asks for."""
    quiet = jax.process_index() > 0
    if run.data.teacher is None:
        return None
    found = Vectors(run.data.teacher, source, quiet)
    check_teacher(run.objective, run.model, found.width)
    return found


def embedded(run: config.Run, source: Source) -> Vectors | None:
    """The embeddings that stand for a tower, which run.data.embeddings names; None if it names none. Raises ConfigError if they
    belong to other data, or have another width."""
    if run.data.embeddings is None or run.embedded is None:
        return None
    found = Vectors(run.data.embeddings, source, jax.process_index() > 0, EMBEDDED[run.embedded])
    remedy = f"its vectors have {found.width} numbers, and the model's {run.model.embed_dim}: write it with `clipjax embed`"
    config.require(found.width == run.model.embed_dim, "data.embeddings", run.data.embeddings, remedy)
    return found


def labels(run: config.Run, source: Source) -> Vectors | None:
    """The classes of the examples, which run.data.labels names; None if it names none. Raises ConfigError if they belong to other
    data, or are more than the model or a term has."""
    if run.data.labels is None:
        return None
    found = Vectors(run.data.labels, source, jax.process_index() > 0, LABELS)
    counts = {"model.classes.count": run.model.classes.count} if run.model.classes else {}
    counts |= {f"objective.{i}.classes": x.classes for i, x in enumerate(run.objective) if isinstance(x, config.Distillation)}
    for name, count in counts.items():
        remedy = f"labels must be less, and {run.data.labels} has {found.highest}: set it to {found.highest + 1} or more"
        config.require(count is None or found.highest < count, name, count, remedy)
    return found


def batches(run: config.Run, source: Source, tokenizer: Tokenizer, **keyed: Vectors | None) -> Batches:
    """A function that opens this process's training batches at a step. `keyed`: `teacher`, `embedded` and `labels`, the results
    of the functions with these names."""
    open_batches = functools.partial(
        train_batches,
        source,
        tokenizer,
        run.data,
        image_size=run.model.image.image_size,
        batch_size=run.train.batch_size,
        seed=run.seed,
        skip=run.train.skip,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        **keyed,
    )
    return lambda step: open_batches(start_step=step)
