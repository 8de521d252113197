"""A run of some seconds on several processes, used as a config file: --data.spec names a tsv of at least 16 images."""

import dataclasses

from clipjax.config import (
    Augment,
    Caption,
    Captioning,
    Constant,
    Data,
    Decoder,
    ImageTower,
    Model,
    Optim,
    Run,
    Sigmoid,
    Softmax,
    TextTower,
    Train,
)

SHAPE = dict(width=16, depth=1, heads=2, mlp_dim=32)


def config() -> Run:
    return Run(
        data=Data(spec="tsv:pairs.tsv", augment=Augment(crop=0.7), workers=2),
        model=Model(
            image=ImageTower(image_size=16, patch_size=8, patch_dropout=0.25, embed_dim=16, **SHAPE),
            text=TextTower(length=8, vocab_size=300, embed_dim=16, **SHAPE),
            dtype="float32",
        ),
        optim=Optim(lr=1e-3, clip_norm=1.0, schedule=Constant(warmup=3)),
        train=Train(steps=20, batch_size=16, log_every=1, checkpoint_every=5, keep=9, eval_batch_size=16),
    )


def siglip() -> Run:
    """The same with SigLIP's towers and loss."""
    run, shape = config(), dict(width=16, depth=1, heads=2, mlp_dim=32)
    image = ImageTower.siglip("B", image_size=16, patch_size=8, **shape)
    text = TextTower.siglip("B", length=8, vocab_size=300, embed_dim=16, **shape)
    model = dataclasses.replace(run.model, image=image, text=text, init_bias=-10.0, init_scale=10.0, max_scale=None)
    return dataclasses.replace(run, model=model, objective=(Sigmoid(),))


def coca() -> Run:
    """The same with a captioning head, whose captions are read at the end; `--evals.0.data` names them."""
    run = config()
    model = dataclasses.replace(run.model, decoder=Decoder(depth=1, heads=2, mlp_dim=32))
    evals = (Captioning(data=run.data.spec, samples=2),)
    return dataclasses.replace(run, model=model, objective=(Softmax(), Caption()), evals=evals)
