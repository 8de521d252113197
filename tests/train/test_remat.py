"""What the backward pass makes again: the choice by size, and the estimate behind it against compiled programs."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import aot, config, plan, sharding
from clipjax.config.load import load_config
from clipjax.models import clip, decoder, vit
from clipjax.models.facts import Layout
from clipjax.models.runner import REMAT_POLICIES
from clipjax.plan.program import state_of
from clipjax.train import remat, remat_time
from tests.train import tiny


def recipe(name: str, pairs: int, policy: str = "auto", devices: int = 4, **train: int) -> config.Run:
    """A file of configs/ with so many pairs a device."""
    run = load_config(f"configs/{name}.py")
    train = dataclasses.replace(run.train, batch_size=pairs * devices, **train)
    return dataclasses.replace(run, train=train, model=dataclasses.replace(run.model, remat=policy))


def choice(run: config.Run, kind: str, devices: int = 4, limit: int | None = None) -> remat.Choice:
    """On so many devices of a kind that isn't here, which say that a program gets `limit` bytes."""
    mesh = sharding.make_mesh(run.mesh, jax.devices()[:devices])
    platform = "tpu" if kind.startswith("TPU") else "gpu"
    stats = None if limit is None else {"bytes_limit": limit}
    device = SimpleNamespace(device_kind=kind, platform=platform, process_index=0, memory_stats=lambda: stats)
    elsewhere = SimpleNamespace(shape=mesh.shape, devices=np.array([device] * devices))
    return remat.choice(run, elsewhere, state_of(run, mesh))


def test_the_estimate_s_policies_are_the_model_s():
    assert set(remat.POLICIES_BY_MEMORY) == REMAT_POLICIES.keys()
    assert list(config.Model.__annotations__["remat"].__args__) == ["auto", "auto-memory", *remat.POLICIES_BY_MEMORY]


@pytest.mark.parametrize(
    ("kind", "pairs", "policy"),
    [
        ("TPU v5 lite", 32, "none"),
        ("TPU v5 lite", 128, "dots"),
        ("TPU v5 lite", 320, "mlp"),
        ("TPU v5 lite", 1024, "full"),
        ("TPU v5 lite", 2**20, "full"),  # nothing fits: the least
        ("TPU v6 lite", 320, "dots"),
        ("TPU v5p", 320, "none"),
        ("NVIDIA H100 80GB HBM3", 192, "none"),
    ],
)
def test_what_is_kept_follows_from_the_size(kind, pairs, policy):
    assert choice(recipe("siglip_b16", pairs, "auto-memory"), kind).policy == policy


@pytest.mark.parametrize(("pairs", "policy"), [(8, "none"), (192, "dots"), (352, "mlp"), (1024, "full")])
def test_a_captioning_head_counts(pairs, policy):
    assert choice(recipe("coca_b32", pairs, "auto-memory"), "TPU v5 lite").policy == policy


@pytest.mark.parametrize(
    ("name", "pairs", "policy", "part"),
    [
        ("siglip_b16", 64, "mlp", 4096),
        ("siglip_b16", 128, "mlp", 4096),
        ("siglip_b16", 512, "full", 4096),  # mlp does not fit
        ("siglip_so400m", 64, "full", 2048),  # a chunk of 4,096 tokens would leave VMEM
    ],
)
def test_a_tpu_gets_what_is_fast_and_not_what_keeps_most(name, pairs, policy, part):
    run = dataclasses.replace(recipe(name, pairs), mesh=config.Mesh())
    said = f"{policy} in parts of {part:,} tokens, the fastest of what fits by the TPU compiler's estimates"
    assert str(choice(run, "TPU v5 lite")) == said


def test_what_nothing_fits_gets_the_least():
    found = choice(recipe("siglip_b16", 2**20), "TPU v5 lite")
    assert str(found) == "full in parts of 2,048 tokens, the least memory: by the estimate, nothing fits"


def test_what_is_left_open_of_the_two_is_chosen():
    """A policy without a part size, and a part size without a policy."""
    run = recipe("siglip_b16", 128)
    model = dataclasses.replace(run.model, part=2048)
    assert choice(dataclasses.replace(run, model=model), "TPU v5 lite").part == 2048
    assert choice(recipe("siglip_b16", 128, "mlp"), "TPU v5 lite").part in remat_time.PARTS
    asked = dataclasses.replace(run, model=dataclasses.replace(model, remat="mlp"))
    assert choice(asked, "TPU v5 lite") == remat.Choice("mlp", 2048)
    assert choice(recipe("siglip_b16", 128, "mlp"), "NVIDIA H100 80GB HBM3") == remat.Choice("mlp")


UNKNOWN = ("NVIDIA RTX 6000 Ada Generation", "Tesla V100-SXM2-32GB", "AMD Instinct MI300X", "NVIDIA H100 80GB HBM3 MIG 1g.10gb")


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_card_is_judged_by_what_it_says_of_its_memory(kind):
    run = recipe("siglip_b16", 64)
    policies = [choice(run, kind, limit=gib * 2**30).policy for gib in (30, 10, 7, 2)]
    assert policies == ["none", "dots", "mlp", "full"]


def test_a_card_that_says_nothing_gets_no_recomputation(monkeypatch):
    monkeypatch.setattr(remat.aot, "capacity", lambda devices: None)
    found = choice(recipe("siglip_b16", 1024), "Radeon")
    assert str(found) == "none, as nothing is known of the devices' memory"


def test_all_processes_follow_what_the_first_one_s_device_says(monkeypatch):
    monkeypatch.setattr(remat.distributed, "value_of_first", lambda name, value: str(7 * 2**30))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert choice(recipe("siglip_b16", 64), "Tesla T4", limit=30 * 2**30).policy == "mlp"


@pytest.mark.parametrize(("policy", "pairs", "gib"), [("full", 352, 5.14), ("mlp", 352, 10.57), ("dots", 64, 6.430)])
def test_a_captioning_head_is_estimated_as_it_was_compiled(policy, pairs, gib):
    """For v5e:16x16 and, the last, 2x2, by hand: minutes each. test_configs.py compiles the second again."""
    run = recipe("coca_b32", pairs, policy)
    mesh = sharding.make_mesh(run.mesh, jax.devices()[:4])
    assert 1 <= remat.needed(run, mesh, state_of(run, mesh), policy) / 2**30 / gib <= 1.1


@pytest.mark.parametrize(
    ("devices", "policy", "gib"), [(1, "none", 28.93), (1, "dots", 12.06), (8, "none", 28.80), (8, "dots", 12.18)]
)
def test_gpus_are_estimated_as_they_were_compiled_for(devices, policy, gib):
    """H100s, by hand. The estimate pads tokens to 128 lanes, which only a TPU does."""
    run = recipe("clip_b16", 256, policy, devices)
    mesh = sharding.make_mesh(run.mesh, jax.devices()[:devices])
    gpus = SimpleNamespace(shape=mesh.shape, devices=np.array([SimpleNamespace(platform="gpu")]))
    assert 0.995 <= remat.needed(run, gpus, state_of(run, mesh), policy) / 2**30 / gib <= 1.25


def test_micro_batches_make_room():
    assert choice(recipe("siglip_b16", 1024, "auto-memory"), "TPU v5 lite").policy == "full"
    assert choice(recipe("siglip_b16", 1024, "auto-memory", micro_batches=8), "TPU v5 lite").policy == "dots"


def test_what_was_asked_for_is_done():
    run = recipe("siglip_b16", 2**20, "dots")
    assert choice(run, "TPU v5 lite").policy == "dots"


def test_a_cpu_makes_nothing_again():
    run = tiny.run()
    mesh = sharding.make_mesh(run.mesh)
    assert run.model.remat == "auto"
    assert remat.resolved(run, mesh, state_of(run, mesh)).model.remat == "none"


def test_each_policy_keeps_less_whatever_the_shape():
    context = config.ImageTower(pool="single", queries=256, embed_dim=1024)  # 255 tokens of width 1024
    for size in config.SIZES:
        head = decoder.facts(config.Decoder.coca(size), config.TextTower.coca(size), context)
        for facts, bytes_each in itertools.product((vit.facts(config.ImageTower.siglip(f"{size}/16")), head), (2, 4)):
            kept = [facts.kept(policy, Layout(bytes_each)) for policy in remat.POLICIES_BY_MEMORY]
            assert kept == sorted(kept, reverse=True)
            assert len(set(kept)) == 4
            half = [facts.kept(policy, Layout(bytes_each, tensor=2)) for policy in remat.POLICIES_BY_MEMORY]
            assert all(n <= m for n, m in zip(half, kept, strict=True))


def test_what_goes_through_the_layers():
    model = dataclasses.replace(tiny.CLIP, image=dataclasses.replace(tiny.CLIP.image, patch_dropout=0.5))
    facts = clip.facts(model)
    assert facts["image"].tokens == tiny.CLIP.image.patches // 2 + 1  # with the class token
    assert facts["text"].tokens == tiny.CLIP.text.length
    assert [facts[tower].per_caption for tower in ("image", "text")] == [False, True]
    model = dataclasses.replace(tiny.CLIP, decoder=config.Decoder(depth=3, heads=4, mlp_dim=64, mlps=2))
    head, d, (tokens, width) = clip.facts(model)["decoder"], tiny.CLIP.text.width, model.image.context
    assert (head.depth, head.tokens) == (3, tiny.CLIP.text.length - 1 + tokens)
    assert head.layer_weights == 4 * d**2 + 2 * d * 128 + 2 * d * (d + width)


def test_every_caption_counts():
    """Of what is kept, and of the rows themselves only images: a caption's tokens are small."""
    run = tiny.run(dataclasses.replace(tiny.CLIP, remat="full"))
    mesh = sharding.make_mesh(run.mesh, jax.devices()[:1])
    three = dataclasses.replace(run, data=config.Data(spec="emoji", captions_per_image=3, ids="caption"))
    facts = clip.facts(run.model)
    part = 4 * max(t.tokens for t in facts.values())  # some of the rows at a time, in both
    one, more = (remat.needed(r, mesh, state_of(r, mesh), "full", part) for r in (run, three))
    text = facts["text"].kept("full", Layout(jnp.dtype(run.model.dtype).itemsize))
    assert more - one == 2 * run.train.batch_size * text


@pytest.mark.slow
@pytest.mark.recipes
def test_the_estimate_is_what_is_compiled_or_a_little_more():
    """For `none`; tests/test_configs.py has the others. By hand, in MiB: `mlp` with 128 pairs 5,843, `dots` with 64 5,814."""
    pytest.importorskip("libtpu", reason="the TPU compiler: pip install libtpu")
    run, devices = recipe("siglip_b16", 32, "none"), aot.tpu_devices("v5e:2x2")
    mesh = sharding.make_mesh(run.mesh, devices)
    peak = plan.compile_run(run, devices).peak_bytes
    assert peak <= remat.needed(run, mesh, state_of(run, mesh), "none") <= 1.25 * peak
