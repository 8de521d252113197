"""The weighted mean of runs' weights: WiSE-FT (2109.01903), of a start and its fine-tuned run; soups (2203.05482), of several."""

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from clipjax import config, sharding
from clipjax.checkpoint import TOKENIZER
from clipjax.config import Run, require
from clipjax.data.tokenizer import Tokenizer
from clipjax.export.imported import require_new, write_weights
from clipjax.files import resolve
from clipjax.models.lora import without
from clipjax.restore import load_params, look_up, split_name

# Fields of a model in which the runs may differ: what training does, not what the weights mean.
TRAINING = r"init_scale|init_bias|max_scale|dtype|remat|unroll|image\.patch_dropout|image\.unlock|text\.unlock|(classes|heads).*"
ROUNDING = 1e-6  # by which the weights' sum may miss 1


class _Opened(NamedTuple):
    """A run whose weights are not read yet."""

    name: str
    run: Run
    tokenizer: Tokenizer | None  # None: of an image tower alone


def average(names: Sequence[str], weights: Sequence[float], out: Path) -> list[tuple[str, int]]:
    """Writes the workdir `out`, whose weights are the sum of `weights` times those of the runs `names`, each RUN or RUN@STEP.

    The logit scale is averaged as it is stored, a logarithm. Where a run has a moving average of its weights, that is taken;
    adapters of low rank are merged first. A run of weight 0 leaves no trace, so that a single weight of 1 gives that run's
    weights bit for bit. The configuration, but for weights, is the first run's. Returns each run's workdir and step. Raises
    ConfigError unless the runs have one model, one tokenizer and one preprocessing, and the weights are finite and sum to 1.
    """
    require_new(out)
    require(len(names) > 1, "RUN", " ".join(names), "name two runs or more")
    remedy = f"must be {len(names)} finite numbers, one for each run, that sum to 1"
    fits = len(weights) == len(names) and all(map(math.isfinite, weights)) and abs(sum(weights) - 1) <= ROUNDING
    require(fits, "--weights", list(weights), remedy)
    first, *others = [_open(name) for name in names]
    for other in others:
        _check_same(first, other)
    params, found = _sum(names, weights)
    run, words = first.run, config.TokenizerFile(path=str(resolve(out) / TOKENIZER), clean=first.run.tokenizer.clean)
    model = replace(run.model, max_scale=_max_scale(run.model, params))
    run = replace(run, model=model, tokenizer=words, optim=replace(run.optim, ema=None), init=None)
    write_weights(run, params, first.tokenizer, out, "clipjax average")
    return found


def _open(name: str) -> _Opened:
    workdir, _, run = look_up(name)
    file, length = workdir / TOKENIZER, run.model.text.length
    tokenizer = Tokenizer.load(file, length, run.tokenizer.clean) if file.exists() else None
    return _Opened(name, replace(run, model=without(run.model)), tokenizer)


def _check_same(first: _Opened, other: _Opened) -> None:
    """Raises ConfigError with the first field in which the two differ in what the weights mean."""
    before, after = _meaning(first), _meaning(other)
    for field in {**before, **after}:
        mine, theirs = before.get(field, "absent"), after.get(field, "absent")
        if mine != theirs:
            remedy = "name runs of one model, one tokenizer and one preprocessing"
            raise config.ConfigError(f"{field} = {theirs} in {other.name} and {mine} in {first.name}: {remedy}")


def _meaning(opened: _Opened) -> dict[str, str]:
    """Field -> value, of all that the runs must have in common."""
    run, words = opened.run, opened.tokenizer
    rows = (row.split(" = ", 1) for row in config.lines(run.model, "model"))
    fields = {name: value for name, value in rows if not re.fullmatch(TRAINING, name.removeprefix("model."))}
    bias = "None" if run.model.init_bias is None else "a number"  # only with one have the weights a bias
    fields |= {"model.init_bias": bias, "data.resize": repr(run.data.resize), "tokenizer.clean": repr(run.tokenizer.clean)}
    tokens = "" if words is None else f"{words.backend.to_str()} {words.pad_id}"
    return fields | {TOKENIZER: f"(checksum {zlib.crc32(tokens.encode()):08x})"}


def _sum(names: Sequence[str], weights: Sequence[float]) -> tuple[Any, list[tuple[str, int]]]:
    """The weighted sum, in float64 and rounded once to float32; and each run's workdir and step."""
    mesh = sharding.make_mesh(config.Mesh())
    total, found = None, []
    for name, weight in zip(names, weights, strict=True):
        _, params, step = load_params(name, mesh)
        found.append((str(split_name(name)[0]), step))
        if weight == 0:
            continue
        part = jax.tree.map(lambda x, weight=weight: weight * np.asarray(x, np.float64), params)
        total = part if total is None else jax.tree.map(np.add, total, part)
    return jax.tree.map(np.float32, total), found


def _max_scale(model: config.Model, params: Any) -> float | None:
    """The model's own, unless the averaged scale is above it, which only weights below 0 or above 1 can bring about."""
    scale, most = math.exp(float(params["log_scale"])), model.max_scale
    return None if most is not None and scale > most * (1 + ROUNDING) else most
