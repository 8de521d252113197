"""A small CoCa on colour emoji: it retrieves names and generates them. It exports to open_clip, whose form of CoCa it has.

Run:      clipjax train emoji_coca --workdir runs/emoji_coca
Cost:     about a quarter of an hour on two CPU cores
Expected: exact match 0.63 of greedy captions, R@1 0.92 text to image and 0.90 image to text, on the 363 held-out combinations; by
          `clipjax eval captioning RUN --data emoji`
"""

from clipjax.config import (
    Augment,
    Caption,
    Captioning,
    Cosine,
    Data,
    Decoder,
    ImageTower,
    Model,
    Optim,
    Retrieval,
    Run,
    Softmax,
    TextTower,
    Train,
)

SHAPE = dict(width=192, heads=3, mlp_dim=768, embed_dim=192)


def config() -> Run:
    return Run(
        # A border and a crop shift and shrink the emoji, so that its place in the image does not matter. No flip and no colour
        # jitter: names contain left, right and skin tones.
        data=Data(spec="emoji", augment=Augment(border=0.06, crop=0.65, aspect=1.1)),
        model=Model(
            image=ImageTower(image_size=48, patch_size=12, depth=6, pool="single", queries=17, pool_heads=3, **SHAPE),
            text=TextTower(length=18, vocab_size=2000, depth=3, pool="cls", legacy_mask=True, **SHAPE),
            decoder=Decoder(depth=2, heads=3, mlp_dim=768, mlps=2),
            dtype="float32",  # CPUs are slower in bfloat16
            unroll=6,
        ),
        objective=(Softmax(), Caption(weight=2.0)),
        optim=Optim(lr=1e-3, weight_decay=0.1, clip_norm=1.0, schedule=Cosine(warmup=40)),
        train=Train(steps=1280, batch_size=128, log_every=20, checkpoint_every=160),
        evals=(Captioning(every=320), Retrieval(every=320)),
    )
