"""A real run that lasts seconds: emoji at 16 px. Used as a config file by the tests of the command line."""

from clipjax.config import Augment, Cosine, Data, ImageTower, Model, Optim, Retrieval, Run, TextTower, Train

SHAPE = dict(width=32, depth=2, heads=4, mlp_dim=64, embed_dim=32)


def config() -> Run:
    return Run(
        data=Data(spec="emoji", augment=Augment(crop=0.7, brightness=0.1), workers=2),
        model=Model(
            image=ImageTower(image_size=16, patch_size=8, patch_dropout=0.25, **SHAPE),
            text=TextTower(length=8, vocab_size=600, **SHAPE),
            dtype="float32",
        ),
        optim=Optim(lr=1e-3, clip_norm=1.0, schedule=Cosine(warmup=10), ema=0.9),
        train=Train(steps=150, batch_size=16, log_every=1, checkpoint_every=20, keep=2, eval_batch_size=64),
        evals=(Retrieval(every=50),),
    )
