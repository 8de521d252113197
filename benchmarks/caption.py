"""Pictures per second of greedy captioning in clipjax and in open_clip's `CoCa.generate`, in turn in one run.

Run:   python benchmarks/caption.py              (needs torch, open_clip_torch and transformers)
Model: image 6x192, patch 8, 64 px, one pooler of 64 queries; text 4x192, 32 tokens; decoder 4x192; 4,000 words; batch 32; float32
Both sides have the same random weights, by `clipjax export`'s table, and the same pictures, as bytes; both write every caption to
its full 32 tokens, as a batch goes on until its last caption has ended and few of these have a reason to; how many are equal is
told. One process a side, all cores each; both stay loaded and take turns, so that a noisy machine is noisy for both; the medians
of the turns are compared. Where torchvision's compiled part can't load, set PYTHONPATH=tests/shim.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from clipjax.environment import MALLOC

SIZE, PATCH, QUERIES, LENGTH, VOCAB, WIDTH, HEADS, BATCH = 64, 8, 64, 32, 4000, 192, 3, 32
IMAGE, TEXT, DECODER = 6, 4, 4  # layers


class Words:
    """What is known of a tokenizer here."""

    start_id, end_id, pad_id, length = 1, VOCAB - 1, 0, LENGTH


def make():
    """The model, its weights and a batch of pictures."""
    import jax
    import numpy as np

    from clipjax import config
    from clipjax.export.table import flatten, unflatten
    from clipjax.models import clip

    shape = dict(width=WIDTH, heads=HEADS, mlp_dim=4 * WIDTH, embed_dim=WIDTH)
    single = dict(pool="single", queries=QUERIES, pool_heads=HEADS)
    model = config.Model(
        image=config.ImageTower(image_size=SIZE, patch_size=PATCH, depth=IMAGE, **shape, **single),
        text=config.TextTower(length=LENGTH, vocab_size=VOCAB, depth=TEXT, pool="cls", legacy_mask=True, **shape),
        decoder=config.Decoder(depth=DECODER, heads=HEADS, mlp_dim=4 * WIDTH, mlps=2),
        dtype="float32",
        unroll=IMAGE,
    )
    rng = np.random.default_rng(0)
    shapes = flatten(jax.eval_shape(lambda: clip.init(model, 0)))
    params = {  # far from an initialisation's, so that captions differ
        path: float(path.endswith("scale")) + (0.1 if "kernel" in path else 0.3) * rng.standard_normal(x.shape, np.float32)
        for path, x in shapes
    }
    return model, unflatten(params), rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)


def clipjax_captions():
    """A function that writes a batch of captions."""
    import jax
    import numpy as np

    from clipjax import config, sharding
    from clipjax.generate import Captioner

    model, params, images = make()
    mesh = sharding.make_mesh(config.Mesh())
    params = jax.device_put(params, sharding.shardings(params, mesh))
    captioner = Captioner(model, mesh, BATCH, Words)
    index = np.arange(BATCH, dtype=np.int32)

    def go():
        batch = sharding.to_global({"image": images, "index": index}, mesh)
        return np.asarray(captioner.generate(params, batch["image"], batch["index"]).tokens)

    return go


def open_clip_captions():
    """A function that writes a batch of captions."""
    import open_clip
    import torch

    from clipjax.export import open_clip as layout
    from clipjax.export.open_clip_generate import greedy
    from clipjax.export.table import to_theirs

    ours, params, images = make()
    special = dict(bos=Words.start_id, eos=Words.end_id, pad=Words.pad_id)
    cfg = layout.configs(ours, special, "squash")["open_clip_config.json"]["model_cfg"]
    del cfg["custom_text"]
    model = open_clip.CoCa(**cfg).eval()
    weights = {name: torch.from_numpy(x) for name, x in to_theirs(layout.table(ours), params).items()}
    model.load_state_dict(weights, strict=True)
    mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in (ours.image.mean, ours.image.std))

    def go():
        pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
        return greedy(model, pixels, Words)

    return go


SIDES = {"clipjax": clipjax_captions, "open_clip": open_clip_captions}


def serve(side, batches):
    """A child process: its captions, then the seconds of a turn for every line on stdin."""
    go = SIDES[side]()
    print(json.dumps(go().tolist()), flush=True)
    for _ in sys.stdin:
        go()
        start = time.perf_counter()
        for _ in range(batches):
            go()
        print(time.perf_counter() - start, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7, help="turns of each side (default 7)")
    parser.add_argument("--batches", type=int, default=1, help="batches a turn, after an untimed one (default 1)")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.batches)
    children, wrote, rates = {}, {}, {side: [] for side in SIDES}
    for side in rates:
        command = [sys.executable, __file__, "--serve", side, "--batches", str(args.batches)]
        env = os.environ | MALLOC
        children[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        while not (line := children[side].stdout.readline()).startswith("[["):
            if children[side].poll() is not None:
                sys.exit(f"{side} failed: exit status {children[side].returncode}")
        wrote[side] = json.loads(line)
    for _ in range(args.turns):
        for side, child in children.items():
            child.stdin.write("go\n")
            child.stdin.flush()
            rates[side].append(args.batches * BATCH / float(child.stdout.readline()))
    for child in children.values():
        child.stdin.close()
        child.wait()
    same = sum(a == b for a, b in zip(*wrote.values(), strict=True))
    full = {side: sum(row.index(Words.end_id) == LENGTH - 1 for row in rows) for side, rows in wrote.items()}
    print(f"equal captions: {same} of {BATCH}; of full length: {', '.join(f'{n} of {side}' for side, n in full.items())}")
    medians = {side: statistics.median(values) for side, values in rates.items()}
    for side, values in rates.items():
        print(f"{side:10} {medians[side]:7.1f} pictures/s  (turns: {min(values):.1f} to {max(values):.1f})")
    ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
    print(f"clipjax / open_clip: {statistics.median(ratios):.2f}  (turns: {min(ratios):.2f} to {max(ratios):.2f})")
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"pictures_per_second": rates, "median": medians, "equal": same}, f, indent=2)


if __name__ == "__main__":
    main()
