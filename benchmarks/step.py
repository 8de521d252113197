"""Images per second of a full train step (loss, gradients, AdamW) in clipjax and in open_clip, in turns.

Run:   python benchmarks/step.py                 (needs torch and open_clip_torch; --only clipjax runs without them)
Model: image 6x192, patch 8, 64 px; text 4x192, 16 tokens; batch 128; float32; each side uses all cores
Both sides get the huge pages that `clipjax` asks of malloc for itself (clipjax.environment.MALLOC); --plain leaves them out for
both. benchmarks/side_by_side.py says how the sides take turns. If torchvision's compiled part can't be loaded, set
PYTHONPATH=tests/shim.
"""

import side_by_side

from clipjax.environment import MALLOC
from clipjax.files import write_json

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
    from clipjax.train.optimizer import optimizer_of
    from clipjax.train.state import initial_state
    from clipjax.train.step import jit_step, make_train_step

    shape = dict(width=WIDTH, heads=HEADS, mlp_dim=4 * WIDTH, embed_dim=WIDTH)
    image = config.ImageTower(image_size=SIZE, patch_size=PATCH, depth=DEPTHS[0], **shape)
    text = config.TextTower(length=LENGTH, vocab_size=VOCAB, depth=DEPTHS[1], **shape)
    model = config.Model(image=image, text=text, dtype="float32", unroll=max(DEPTHS))
    run = config.Run(data=config.Data(spec="emoji"), model=model, train=config.Train(batch_size=BATCH))
    mesh = sharding.make_mesh(config.Mesh())
    tx = optimizer_of(run, jax.eval_shape(lambda: clip.init(model, 0)))
    state = initial_state(run, tx, mesh)
    step = jit_step(make_train_step(run, tx, mesh), state, mesh)
    images, tokens = make_batch()
    batch = {"image": images, "text": tokens, "index": np.arange(BATCH, dtype=np.int32)}

    def take_steps(steps):
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, sharding.to_global(batch, mesh))
        jax.block_until_ready((state, metrics))

    return take_steps


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

    def take_steps(steps):
        for _ in range(steps):
            pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
            optimizer.zero_grad()
            loss_of(*model(pixels, torch.from_numpy(tokens).long())).backward()
            optimizer.step()

    return take_steps


SIDES = {"clipjax": clipjax_step, "open_clip": open_clip_step}


def main():
    parser = side_by_side.arguments(__doc__, SIDES)
    parser.add_argument("--steps", type=int, default=5, help="timed steps in a turn, after an untimed one (default 5)")
    parser.add_argument("--only", choices=SIDES, help="time one side only")
    parser.add_argument("--plain", action="store_true", help="leave malloc's settings as they are")
    args = parser.parse_args()
    if args.serve:
        take_steps = SIDES[args.serve]()
        take_steps(3)
        return side_by_side.serve(lambda: take_steps(1), lambda: take_steps(args.steps))
    names = [args.only] if args.only else list(SIDES)
    with side_by_side.started(__file__, names, ["--steps", str(args.steps)], {} if args.plain else MALLOC) as sides:
        for side in sides:
            side.about()
        rates = side_by_side.rates(sides, args.turns, args.steps * BATCH)
    medians = side_by_side.report(rates, "images/s")
    if args.json:
        write_json(args.json, {"images_per_second": rates, "median": medians})


if __name__ == "__main__":
    main()
