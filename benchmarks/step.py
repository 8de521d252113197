"""Images per second of one whole train step (loss, gradients, AdamW) in clipjax and in open_clip, in turn in one run.

Run:   python benchmarks/step.py                 (needs torch and open_clip_torch; --only clipjax runs without them)
Model: image 6x192, patch 8, 64 px; text 4x192, 16 tokens; batch 128; float32; one process a side, all cores each
Both sides stay loaded and take turns, so that a noisy machine is noisy for both; the medians of the turns are compared. Both
are given the huge pages that `clipjax` asks of malloc for itself (clipjax.environment.MALLOC); --plain leaves them out for both.
A turn begins with an untimed step: a virtual machine returns idle memory to its host, and getting it back was seen to cost the
first step after the other side's turn four seconds of kernel time, which training without pauses does not pay.
Where torchvision's compiled part can't load, set PYTHONPATH=tests/shim.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from clipjax.environment import MALLOC

SIZE, PATCH, LENGTH, VOCAB, WIDTH, HEADS, BATCH = 64, 8, 16, 4000, 192, 3, 128
DEPTHS = (6, 4)  # of the image and the text tower


def make_batch():
    import numpy as np

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)
    return images, rng.integers(1, VOCAB, (BATCH, LENGTH), np.int32)


def clipjax_step():
    """A function that takes n steps."""
    import jax
    import numpy as np

    from clipjax import config, sharding
    from clipjax.models import clip
    from clipjax.train.optimizer import make_optimizer
    from clipjax.train.state import initial_state
    from clipjax.train.step import jit_step, make_train_step

    shape = dict(width=WIDTH, heads=HEADS, mlp_dim=4 * WIDTH, embed_dim=WIDTH)
    image = config.ImageTower(image_size=SIZE, patch_size=PATCH, depth=DEPTHS[0], **shape)
    text = config.TextTower(length=LENGTH, vocab_size=VOCAB, depth=DEPTHS[1], **shape)
    model = config.Model(image=image, text=text, dtype="float32", unroll=max(DEPTHS))
    run = config.Run(model=model, train=config.Train(batch_size=BATCH))
    mesh = sharding.make_mesh(config.Mesh())
    tx = make_optimizer(run.optim, run.train.steps, jax.eval_shape(lambda: clip.init(model, 0)))
    state = initial_state(run, tx, mesh)
    step = jit_step(make_train_step(run, tx, mesh), state, mesh)
    images, tokens = make_batch()
    batch = {"image": images, "text": tokens, "index": np.arange(BATCH, dtype=np.int32)}

    def go(steps):
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, sharding.to_global(batch, mesh))
        jax.block_until_ready((state, metrics))

    return go


def open_clip_step():
    """A function that takes n steps."""
    import open_clip
    import torch

    vision = dict(image_size=SIZE, patch_size=PATCH, layers=DEPTHS[0], width=WIDTH, head_width=WIDTH // HEADS)
    text = dict(context_length=LENGTH, vocab_size=VOCAB, width=WIDTH, heads=HEADS, layers=DEPTHS[1])
    model = open_clip.model.CLIP(embed_dim=WIDTH, vision_cfg=vision, text_cfg=text)
    loss_of = open_clip.loss.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    images, tokens = make_batch()
    mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))

    def go(steps):
        for _ in range(steps):
            pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
            optimizer.zero_grad()
            loss_of(*model(pixels, torch.from_numpy(tokens).long())).backward()
            optimizer.step()

    return go


SIDES = {"clipjax": clipjax_step, "open_clip": open_clip_step}


def serve(side, steps):
    """A child process: answers every line on stdin with the seconds of a turn."""
    go = SIDES[side]()
    go(3)
    print("ready", flush=True)
    for _ in sys.stdin:
        go(1)
        start = time.perf_counter()
        go(steps)
        print(time.perf_counter() - start, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7, help="turns of each side (default 7)")
    parser.add_argument("--steps", type=int, default=5, help="steps a turn (default 5)")
    parser.add_argument("--only", choices=SIDES, help="one side alone")
    parser.add_argument("--plain", action="store_true", help="malloc as it comes")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.steps)
    children, rates = {}, {side: [] for side in ([args.only] if args.only else SIDES)}
    for side in rates:
        command = [sys.executable, __file__, "--serve", side, "--steps", str(args.steps)]
        env = os.environ | ({} if args.plain else MALLOC)
        children[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    for child in children.values():
        while child.stdout.readline().strip() != "ready":
            if child.poll() is not None:
                sys.exit(f"a side failed: exit status {child.returncode}")
    for _ in range(args.turns):
        for side, child in children.items():
            child.stdin.write("go\n")
            child.stdin.flush()
            rates[side].append(args.steps * BATCH / float(child.stdout.readline()))
    for child in children.values():
        child.stdin.close()
        child.wait()
    medians = {side: statistics.median(values) for side, values in rates.items()}
    for side, values in rates.items():
        print(f"{side:10} {medians[side]:7.1f} images/s  (turns: {min(values):.1f} to {max(values):.1f})")
    if not args.only:
        ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
        print(f"clipjax / open_clip: {statistics.median(ratios):.2f}  (turns: {min(ratios):.2f} to {max(ratios):.2f})")
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"images_per_second": rates, "median": medians}, f, indent=2)


if __name__ == "__main__":
    main()
