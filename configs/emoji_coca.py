"""A small CoCa on colour emoji: it finds names for pictures, and writes them. Its form is open_clip's, so it exports there.

Run:      clipjax train configs/emoji_coca.py --workdir runs/emoji_coca
Cost:     not yet run
Expected: not yet run
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
        # A crop that keeps most of the picture, and no flip or colour jitter: names speak of left, right and skin tones.
        data=Data(spec="emoji", augment=Augment(crop=0.8, aspect=1.1)),
        model=Model(
            image=ImageTower(image_size=48, patch_size=12, depth=6, pool="single", queries=17, pool_heads=3, **SHAPE),
            text=TextTower(length=16, vocab_size=2000, depth=3, pool="cls", legacy_mask=True, **SHAPE),
            decoder=Decoder(depth=2, heads=3, mlp_dim=768, mlps=2),
            dtype="float32",  # CPUs are slower in bfloat16
            unroll=6,
        ),
        objective=(Softmax(), Caption(weight=2.0)),
        optim=Optim(lr=1e-3, weight_decay=0.1, clip_norm=1.0, schedule=Cosine(warmup=20)),
        train=Train(steps=360, batch_size=256, log_every=10, checkpoint_every=120),
        evals=(Captioning(data="emoji", split="test", every=120), Retrieval(data="emoji", split="test", every=120)),
    )
