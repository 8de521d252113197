"""The part of a configuration that is about training: optimizer, schedule, mesh, logs and checkpoints."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from clipjax.config.fields import POSITIVE_SHARE, TAGGED, ConfigError, Strict, free, require
from clipjax.config.model import Model


@dataclass(frozen=True, kw_only=True)
class Cosine(Strict, prefix="optim.schedule"):
    """Warm-up, then half a cosine down to `final` times the peak at train.steps."""

    kind: Literal["cosine"] = "cosine"
    warmup: int = 2000  # steps in which the learning rate rises from 0
    final: float = 0.0  # share of the peak at train.steps

    def __post_init__(self) -> None:
        require(self.warmup >= 0, "optim.schedule.warmup", self.warmup, "must not be negative")
        require(0 <= self.final <= 1, "optim.schedule.final", self.final, "must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class Rsqrt(Strict, prefix="optim.schedule"):
    """Warm-up, then 1/sqrt(step), then a linear cool-down to 0 over the last `cooldown` steps (2106.04560)."""

    kind: Literal["rsqrt"] = "rsqrt"
    warmup: int = 10000  # steps in which the learning rate rises from 0
    timescale: int = 10000  # steps; n steps after the warm-up the rate is the peak / sqrt(1 + n / timescale)
    cooldown: int = 0  # steps of the linear fall to 0 at the end

    def __post_init__(self) -> None:
        require(self.timescale > 0, "optim.schedule.timescale", self.timescale, "must be positive")
        for name in ("warmup", "cooldown"):
            require(getattr(self, name) >= 0, f"optim.schedule.{name}", getattr(self, name), "must not be negative")


@dataclass(frozen=True, kw_only=True)
class Constant(Strict, prefix="optim.schedule"):
    """Warm-up, then constant, then a linear cool-down to 0 over the last `cooldown` steps."""

    kind: Literal["constant"] = "constant"
    warmup: int = 2000  # steps in which the learning rate rises from 0
    cooldown: int = 0  # steps of the linear fall to 0 at the end

    def __post_init__(self) -> None:
        for name in ("warmup", "cooldown"):
            require(getattr(self, name) >= 0, f"optim.schedule.{name}", getattr(self, name), "must not be negative")


Schedule = Annotated[Cosine | Rsqrt | Constant, TAGGED]


def check_pattern(pattern: str, name: str) -> None:
    """Raises ConfigError for what is no regular expression. `name`: the field that holds it."""
    try:
        re.compile(pattern)
    except re.error as e:
        raise ConfigError(f"{name} = {pattern!r}: is not a regular expression: {e}") from e


@dataclass(frozen=True, kw_only=True)
class Rule(Strict, prefix="optim.rules"):
    """Factors on the learning rate and on the weight decay, for the parameters whose full path matches `pattern`."""

    pattern: str  # a regular expression, for full paths as `image/blocks/mlp/up/kernel`
    lr: float = 1.0  # factor on the learning rate; 0 freezes
    decay: float = 1.0  # factor on the weight decay
    # x: the learning rate of each layer is x times that of the one above it: x^L of the first of L layers, x^(L + 1) of what is
    # below the layers, 1 of what is above (BEiT, 2106.08254).
    layer_decay: float = 1.0


# Below a tower's layers stand these parts.
BELOW = ("patch", "tokens", "class_token", "positions", "pre_norm")
# Kernels decay; gains, biases, positions, class token, scale and bias do not (2103.00020, section 2.5).
RULES = (Rule(pattern=".*/kernel|text/tokens"), Rule(pattern=".*", decay=0.0))


def freezing(model: Model) -> tuple[Rule, ...]:
    """The rules that a model's `lora` and `unlock` stand for: they freeze what is not trained, but for locked layers."""
    rules = []
    for name, tower in (("image", model.image), ("text", model.text)):
        if tower.lora is not None:
            rules.append(Rule(pattern=rf"{name}/(?!blocks/.*/lora_[ab]$).*", lr=0.0))
        elif tower.unlock is not None:
            parts = f"({'|'.join(BELOW)})(/.*)?" if tower.unlock else ".*"
            rules.append(Rule(pattern=f"{name}/{parts}", lr=0.0))
    return tuple(rules)


@dataclass(frozen=True, kw_only=True)
class Optim(Strict, prefix="optim"):
    """The optimizer, its schedule, and the rules that say what they do to each parameter."""

    kind: Literal["adamw", "lamb", "lion", "adafactor"] = "adamw"  # the optimizer
    lr: float = 5e-4  # learning rate at the peak of the schedule
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.98  # decay of the second moment
    eps: float = 1e-6  # added to the root of the second moment
    weight_decay: float = 0.2  # multiplied by the learning rate
    clip_norm: float | None = None  # largest global norm of the gradient, which is scaled down to it; None: no clipping
    mu_dtype: Literal["float32", "bfloat16"] = "float32"  # type of the first moment
    schedule: Schedule = Cosine()  # the learning rate over the steps
    rules: tuple[Rule, ...] = RULES  # the first that matches counts; every parameter must match one
    ema: float | None = None  # decay of a moving average of the weights, which evaluations use; None: no average

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", self.lr, "must be positive")
        for name in ("b1", "b2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "must lie in [0, 1)")
        for name in ("eps", "weight_decay"):
            require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "must not be negative")
        require(self.clip_norm is None or self.clip_norm > 0, "optim.clip_norm", self.clip_norm, "must be positive or None")
        require(self.ema is None or 0 < self.ema < 1, "optim.ema", self.ema, "must lie in (0, 1) or be None")
        for i, rule in enumerate(self.rules):
            for name in ("lr", "decay"):
                factor = getattr(rule, name)
                require(factor >= 0, f"optim.rules.{i}.{name}", factor, "is a factor and must not be negative; 0 turns it off")
            check_pattern(rule.pattern, f"optim.rules.{i}.pattern")
            POSITIVE_SHARE.require(f"optim.rules.{i}.layer_decay", rule.layer_decay)


@dataclass(frozen=True, kw_only=True)
class Mesh(Strict, prefix="mesh"):
    """How many devices each axis of the mesh has. The batch is sharded over data x fsdp, the weights over fsdp x tensor."""

    data: int = free(-1)  # shards the batch; -1: all devices that are left
    fsdp: int = free(1)  # shards the batch and the weights
    tensor: int = free(1)  # shards heads, MLP widths and the words of the vocabulary
    # Whether `data` also shards the weights in float32 and the optimizer's state, and each device updates its share; a step
    # gathers what the towers use. None: on TPUs and GPUs, where neither fsdp nor tensor shards them.
    shard_optimizer: bool | None = free(None)

    def __post_init__(self) -> None:
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for name, n in sizes.items():
            require(n == -1 or n > 0, f"mesh.{name}", n, "must be positive, or -1 for all devices that are left")
        require([*sizes.values()].count(-1) <= 1, "mesh", sizes, "only one axis can be -1")


@dataclass(frozen=True, kw_only=True)
class Init(Strict, prefix="init"):
    """Other runs, of which a new workdir takes the weights or, with state = "all", goes on. Each is a workdir, for its newest
    checkpoint, or workdir@STEP. A workdir that has checkpoints goes on from its own, and reads none of these.
    """

    run: str = ""  # the run of all that `image` and `text` do not give: towers, captioning head, scale and bias; empty: none
    image: str = ""  # the run of the image tower; empty: that of `run`
    text: str = ""  # the run of the text tower and of the tokenizer; empty: that of `run`
    # Regular expressions: parameters, by their full paths, that may be new here or left there, and fields of the model that may
    # differ though they change what the weights compute.
    allow: tuple[str, ...] = ()
    # What is taken. weights: the moving average where there is one; optimizer, step and data begin anew. all: weights, optimizer,
    # step, moving average, example memory, place in the data.
    state: Literal["weights", "all"] = "weights"

    def __post_init__(self) -> None:
        remedy = "must name a workdir, or workdir@STEP; or give init.image or init.text"
        require(bool(self.run or self.image or self.text), "init.run", self.run, remedy)
        for i, pattern in enumerate(self.allow):
            check_pattern(pattern, f"init.allow.{i}")
        if self.state == "all":
            require(bool(self.run), "init.run", self.run, "must name a workdir, or workdir@STEP: init.state = 'all' is one run's")
            remedy = "leave it out, or set init.state = 'weights': 'all' is of init.run alone"
            for name in ("image", "text", "allow"):
                require(not getattr(self, name), f"init.{name}", getattr(self, name), remedy)


@dataclass(frozen=True, kw_only=True)
class Train(Strict, prefix="train"):
    """How long a run is, how large its batch is, how often it logs and saves, and which checkpoints it keeps."""

    steps: int = 10000  # updates of the weights
    batch_size: int = 1024  # pairs a step, over all devices
    micro_batches: int = free(1)  # parts of a batch, seen in turn: less memory, the same gradient, one more forward pass
    log_every: int = free(50)  # steps between two lines of metrics
    checkpoint_every: int = free(1000)  # steps between two checkpoints; there is always one at the end
    keep: int = free(3)  # how many of the newest checkpoints are kept
    keep_every: int | None = free(None)  # checkpoints of multiples of this step are kept for good, too; None: none are
    # Also keep the best checkpoint by this metric, as `zeroshot_retrieval/image_retrieval_recall@1`; where several evaluations
    # have that task, as `zeroshot_retrieval/emoji/test/image_retrieval_recall@1`.
    best: str | None = free(None)
    wandb: str | None = free(None)  # PROJECT or ENTITY/PROJECT of Weights & Biases that gets the metrics, too; None: none does
    eval_batch_size: int = free(256)  # examples that an evaluation encodes at once, over all devices
    # Batches to leave out: each pair (a, b) leaves out the batches a, ..., b - 1 of the order, which counts from 0.
    skip: tuple[tuple[int, int], ...] = free(())
    # A step whose loss or gradient norm is not finite: `stop` ends the run; `skip` leaves weights, optimizer, moving average and
    # example memory as they are, and goes on with the next batch.
    nonfinite: Literal["stop", "skip"] = free("stop")
    nonfinite_max: int = free(10)  # the most such steps in a row that are skipped; one more ends the run

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "micro_batches", "log_every", "checkpoint_every", "keep", "eval_batch_size")
        for name in (*counts, "nonfinite_max"):
            require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "must be positive")
        require(self.steps < 2**31, "train.steps", self.steps, "must be less than 2^31: steps are counted in 32 bits")
        if self.keep_every is not None:
            require(self.keep_every > 0, "train.keep_every", self.keep_every, "must be positive or None")
            remedy = f"must be a multiple of train.checkpoint_every = {self.checkpoint_every}: only what is saved can be kept"
            require(self.keep_every % self.checkpoint_every == 0, "train.keep_every", self.keep_every, remedy)
        is_project = self.wandb is None or re.fullmatch(r"([\w.-]+/)?[^/\\#?%:]{1,128}", self.wandb) is not None
        require(is_project, "train.wandb", self.wandb, "must be PROJECT or ENTITY/PROJECT, without another of / \\ # ? % :")
        remedy = f"must divide train.batch_size = {self.batch_size}, and each device's share of it"
        require(self.batch_size % self.micro_batches == 0, "train.micro_batches", self.micro_batches, remedy)
        remedy = "must be pairs (a, b) with 0 <= a < b, ascending and without overlap: batches a, ..., b - 1 are left out"
        bounds = [0, *(bound for pair in self.skip for bound in pair)]
        ascends = bounds == sorted(bounds) and all(first < end for first, end in self.skip)
        require(ascends, "train.skip", self.skip, remedy)

    def place(self, step: int) -> int:
        """The batch of the order on which the step after `step` finished ones trains. Both count from 0."""
        for first, end in self.skip:
            step += end - first if step >= first else 0
        return step

    def first_other_batch(self, other: "Train") -> int | None:
        """The first step, from 0, for which another `skip` gives another batch; None if there is none."""
        turns = []  # steps before which batches are left out
        for train in (self, other):
            left_out = 0
            for first, end in train.skip:
                turns.append(first - left_out)
                left_out += end - first
        return next((step for step in sorted(turns) if self.place(step) != other.place(step)), None)
