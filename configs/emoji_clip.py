"""A small CLIP on colour emoji and their English names.

Run:      clipjax train configs/emoji_clip.py --workdir runs/emoji
Cost:     not yet run
Expected: not yet run
"""

from clipjax.config import BPE, Augment, Cosine, Data, ImageTower, Model, Optim, Retrieval, Run, TextTower, Train

SHAPE = dict(width=192, heads=3, mlp_dim=768, embed_dim=192)


def config() -> Run:
    return Run(
        data=Data(spec="emoji", augment=Augment(crop=0.8, aspect=1.1, brightness=0.1)),
        tokenizer=BPE(),
        model=Model(
            image=ImageTower(image_size=64, patch_size=8, depth=6, **SHAPE),
            text=TextTower(length=16, vocab_size=2000, depth=4, **SHAPE),
            dtype="float32",  # CPUs are slower in bfloat16
            unroll=6,
        ),
        optim=Optim(lr=1e-3, weight_decay=0.1, clip_norm=1.0, schedule=Cosine(warmup=20)),
        train=Train(steps=200, batch_size=256, log_every=10, checkpoint_every=100),
        evals=(Retrieval(data="emoji", split="test", every=50),),
    )
