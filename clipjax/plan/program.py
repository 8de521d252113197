"""The train step of a run, compiled as for training, but from shapes alone: without data, tokenizer or weights."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from clipjax import aot, config, sharding
from clipjax.config.objective import check_teacher
from clipjax.files import local_path
from clipjax.models import clip, cudnn, tpu_attention
from clipjax.train import remat
from clipjax.train.optimizer import optimizer_of
from clipjax.train.state import TrainState, abstract_state
from clipjax.train.step import jit_step, make_train_step


def compile_run(run: config.Run, devices: Sequence[jax.Device]) -> aot.Compiled:
    """Compiles the run's train step for its mesh over `devices`, which may be `aot.tpu_devices`.

    Raises ConfigError if the run does not fit the mesh, aot.DoesNotFit and aot.CompilerError.
    """
    mesh = sharding.make_mesh(run.mesh, devices)
    return compile_lowered(lower_step(run, mesh, state_of(run, mesh)), mesh)


def compile_lowered(lowered: jax.stages.Lowered, mesh: Mesh) -> aot.Compiled:
    """Compiles the result of `lower_step`. Raises aot.DoesNotFit and aot.CompilerError."""
    return aot.compile(lowered, dump=mesh.devices.flat[0].platform == "tpu")


def lower_step(run: config.Run, mesh: Mesh, state: TrainState) -> jax.stages.Lowered:
    """The step for a `state` from `state_of`, traced but not compiled, which takes seconds. Raises ConfigError."""
    sharding.check_batch(run, mesh)
    cudnn.check(run.model, mesh.devices.flat[0])
    tpu_attention.check(run.model, mesh.devices.flat[0], mesh.shape["tensor"])
    run = remat.resolved(run, mesh, state)
    step = make_train_step(run, optimizer_of(run, state.params), mesh)
    with cudnn.assumed():
        return jit_step(step, state, mesh).lower(state, abstract_batch(run, mesh))


def state_of(run: config.Run, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the run's state. Raises ConfigError."""
    params = jax.eval_shape(lambda: clip.init(run.model, run.seed))
    return abstract_state(run, optimizer_of(run, params), mesh)


def abstract_batch(run: config.Run, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The global batch that the loop gives to the devices: uint8 images, token ids, indices, and what `run.data` adds."""
    size, side = run.train.batch_size, run.model.image.image_size
    views, texts = ((n,) if n > 1 else () for n in (run.data.views_per_image, run.data.texts_per_image))
    shapes = {
        "image": ("uint8", (*views, side, side, 3)),
        "text": ("int32", (*texts, run.model.text.length)),
        "index": ("int32", ()),
    }
    if run.embedded is not None:
        shapes["embedded"] = ("float32", (run.model.embed_dim,))
    if run.embedded == "image":
        del shapes["image"]
    if run.data.ids is not None:
        shapes["id"] = ("int32", ())
    if (width := teacher_width(run)) is not None:
        shapes |= {f"teacher_{side}": ("float32", (width,)) for side in ("image", "text")}
    if run.data.labels is not None:
        shapes["label"] = ("int32", (label_count(run),))
    rows = sharding.over_rows(mesh)
    return {k: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=rows) for k, (dtype, shape) in shapes.items()}


def teacher_width(run: config.Run) -> int | None:
    """The width of data.teacher's embeddings; None without a teacher. If this machine has not the file: the model's width."""
    if run.data.teacher is None:
        return None
    width = _width("data.teacher", run.data.teacher) or run.model.embed_dim
    check_teacher(run.objective, run.model, width)
    return width


def label_count(run: config.Run) -> int:
    """Classes of an example, of data.labels. The dataset's own, and those of a file that this machine has not, count as one."""
    return (run.data.labels not in (None, "own") and _width("data.labels", run.data.labels)) or 1


def _width(field: str, file: str | None) -> int | None:
    """The width of a keyed file's arrays; None if this machine has not the file. Raises ConfigError for another file."""
    from clipjax.data.vectors import LABELS, TEACHER, keyed_arrays

    use, path = {use.field: use for use in (LABELS, TEACHER)}[field], local_path(field, str(file)).expanduser()
    arrays = keyed_arrays(path, f"{field} = {file!r}", use)[0] if path.is_file() else {}
    return next((x.shape[1] for x in arrays.values()), None)
