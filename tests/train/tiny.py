"""The small runs that tests of training share."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clipjax import config, sharding
from clipjax.models import clip
from clipjax.train import loop
from clipjax.train.optimizer import optimizer_of
from clipjax.train.state import TrainState, initial_state
from clipjax.train.step import jit_step, make_train_step
from clipjax.train.workdir import Workdir, open_workdir

SHAPE = dict(width=32, depth=2, heads=4, mlp_dim=64)
CLIP = config.Model(
    image=config.ImageTower(image_size=16, patch_size=8, embed_dim=16, **SHAPE),
    text=config.TextTower(length=8, vocab_size=400, embed_dim=16, **SHAPE),
    dtype="float32",
)
SIGLIP = dataclasses.replace(
    CLIP,
    image=config.ImageTower.siglip("B", image_size=16, patch_size=8, **SHAPE),
    text=config.TextTower.siglip("B", length=8, vocab_size=400, embed_dim=32, **SHAPE),
    init_bias=-10.0,
    init_scale=10.0,
    max_scale=None,
)
COCA = dataclasses.replace(
    CLIP,
    image=dataclasses.replace(CLIP.image, pool="cascade", queries=4, pool_heads=2),
    text=dataclasses.replace(CLIP.text, pool="cls"),
    decoder=config.Decoder(depth=2, heads=4, mlp_dim=64, parallel=0.5),
)
TRAIN = config.Train(steps=20, batch_size=16, log_every=1, checkpoint_every=5)
OPTIM = config.Optim(lr=1e-3, clip_norm=1.0, schedule=config.Cosine(warmup=3))


def run(model: config.Model = CLIP, **changes: Any) -> config.Run:
    """A run of a few seconds."""
    terms = (config.Softmax() if model.init_bias is None else config.Sigmoid(),)
    terms += () if model.decoder is None else (config.Caption(),)
    return config.Run(**(dict(data=config.Data(spec="emoji"), model=model, objective=terms, train=TRAIN, optim=OPTIM) | changes))


def batches(cfg: config.Run, steps: int) -> list[dict[str, np.ndarray]]:
    """Noise that has the shapes of a run's batches."""
    rng = np.random.default_rng(0)
    size, image, text = cfg.train.batch_size, cfg.model.image, cfg.model.text
    views, texts = ((n,) if n > 1 else () for n in (cfg.data.views_per_image, cfg.data.texts_per_image))
    return [
        {
            "image": rng.integers(0, 256, (size, *views, image.image_size, image.image_size, 3), np.uint8),
            "text": rng.integers(0, text.vocab_size, (size, *texts, text.length), np.int32),
            "index": np.arange(step * size, (step + 1) * size, dtype=np.int32),
        }
        for step in range(steps)
    ]


def marks(n: int, bad: int = 0, filtered: int = 0, truncated: int = 0) -> dict[str, np.ndarray]:
    """What a batch of n examples says of them; the first so many are bad (they can't be read), left out, or truncated."""
    replaced, row = np.arange(n) < bad, np.arange(n)
    flags = {"replaced": replaced, "filtered": row < filtered, "truncated": row < truncated}
    return flags | {"fault": replaced.astype(np.int8), "fault_index": np.where(replaced, row, -1).astype(np.int32)}


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over the first devices."""
    return sharding.make_mesh(config.Mesh(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])


def train(cfg: config.Run, mesh: Mesh, steps: int) -> tuple[TrainState, list[float], Any]:
    """The state after some steps, the losses, and the step function."""
    tx = optimizer_of(cfg, jax.eval_shape(lambda: clip.init(cfg.model, cfg.seed)))
    state = initial_state(cfg, tx, mesh)
    step = jit_step(make_train_step(cfg, tx, mesh), state, mesh)
    losses = []
    for batch in batches(cfg, steps):
        state, metrics = step(state, sharding.to_global(batch, mesh))
        losses.append(float(metrics["loss"]))
    return state, losses, step


def opened(cfg: config.Run, workdir: Path) -> Workdir:
    """What `open_workdir` finds, on one device. The folder has no owner any more when it is returned."""
    with open_workdir(cfg, workdir, mesh_of()) as found:
        return found


def train_in(
    workdir: Path, cfg: config.Run, batches: loop.Batches, evaluators: Sequence[loop.Evaluator], mesh: Mesh
) -> TrainState:
    """What `clipjax train` does once its data and evaluators are there."""
    with open_workdir(cfg, workdir, mesh) as found:
        return loop.train(cfg, found, batches, evaluators, mesh)
