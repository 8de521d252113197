"""Images per second of greedy captioning in clipjax and in open_clip's `CoCa.generate`, in turns.

Run:   python benchmarks/caption.py              (needs torch, open_clip_torch and transformers)
Model: image 6x192, patch 8, 64 px, one pooler of 64 queries; text 4x192, 32 tokens; decoder 4x192; 4,000 words; batch 32; float32
Both sides have the same random weights, through the table of `clipjax export`, and the same images, as bytes. Both generate 32
tokens for every caption: a batch ends with its last caption, and with random weights few end early. The script prints how many
captions are equal. Each side uses all cores; benchmarks/side_by_side.py says how they take turns. If torchvision's compiled part
can't be loaded, set PYTHONPATH=tests/shim.
"""

import side_by_side

from clipjax.environment import MALLOC
from clipjax.files import write_json

SIZE, PATCH, QUERIES, LENGTH, VOCAB, WIDTH, HEADS, BATCH = 64, 8, 64, 32, 4000, 192, 3, 32
IMAGE, TEXT, DECODER = 6, 4, 4  # layers


class Tokens:
    """The part of a tokenizer that generation needs."""

    start_id, end_id, pad_id, length = 1, VOCAB - 1, 0, LENGTH


def make():
    """The model, its weights and a batch of images."""
    import jax
    import numpy as np

    from clipjax import config
    from clipjax.export.formats.table import flatten, unflatten
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
    params = {  # larger than at initialisation, so that captions differ
        path: float(path.endswith("scale")) + (0.1 if "kernel" in path else 0.3) * rng.standard_normal(x.shape, np.float32)
        for path, x in shapes
    }
    return model, unflatten(params), rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)


def clipjax_captions():
    """A function that generates a batch of captions: ids [batch, length]."""
    import jax
    import numpy as np

    from clipjax import config, sharding
    from clipjax.generate import Captioner

    model, params, images = make()
    mesh = sharding.make_mesh(config.Mesh())
    params = jax.device_put(params, sharding.shardings(params, mesh))
    captioner = Captioner(model, mesh, BATCH, Tokens)
    index = np.arange(BATCH, dtype=np.int32)

    def generate():
        batch = sharding.to_global({"image": images, "index": index}, mesh)
        return np.asarray(captioner.generate(params, batch["image"], batch["index"]).tokens)

    return generate


def open_clip_captions():
    """A function that generates a batch of captions: ids [batch, length]."""
    import open_clip
    import torch

    from clipjax.export.compare.open_clip_generate import greedy
    from clipjax.export.formats import open_clip as layout
    from clipjax.export.formats.table import to_theirs

    ours, params, images = make()
    special = dict(bos=Tokens.start_id, eos=Tokens.end_id, pad=Tokens.pad_id)
    cfg = layout.configs(ours, special, "squash")["open_clip_config.json"]["model_cfg"]
    del cfg["custom_text"]
    model = open_clip.CoCa(**cfg).eval()
    weights = {name: torch.from_numpy(x) for name, x in to_theirs(layout.table(ours), params).items()}
    model.load_state_dict(weights, strict=True)
    mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in (ours.image.mean, ours.image.std))

    def generate():
        pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
        return greedy(model, pixels, Tokens)

    return generate


SIDES = {"clipjax": clipjax_captions, "open_clip": open_clip_captions}


def main():
    parser = side_by_side.arguments(__doc__, SIDES)
    parser.add_argument("--batches", type=int, default=1, help="timed batches in a turn, after an untimed one (default 1)")
    args = parser.parse_args()
    if args.serve:
        generate = SIDES[args.serve]()
        return side_by_side.serve(generate, lambda: [generate() for _ in range(args.batches)], generate().tolist())
    with side_by_side.started(__file__, list(SIDES), ["--batches", str(args.batches)], MALLOC) as sides:
        captions = {side.name: side.about() for side in sides}
        rates = side_by_side.rates(sides, args.turns, args.batches * BATCH)
    same = sum(a == b for a, b in zip(*captions.values(), strict=True))
    full = {side: sum(row.index(Tokens.end_id) == LENGTH - 1 for row in rows) for side, rows in captions.items()}
    print(f"equal captions: {same} of {BATCH}; of full length: {', '.join(f'{n} of {side}' for side, n in full.items())}")
    medians = side_by_side.report(rates, "images/s")
    if args.json:
        write_json(args.json, {"pictures_per_second": rates, "median": medians, "equal": same})


if __name__ == "__main__":
    main()
