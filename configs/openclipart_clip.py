"""A small CLIP on drawings of the Open Clip Art Library, with their titles, keywords and descriptions.

Run:      clipjax train openclipart_clip --workdir runs/openclipart
Needs:    `clipjax data prepare openclipart` in the same folder
Cost:     33 minutes on two CPU cores that ten programs shared
Expected: R@10 0.27 text to image, 0.30 image to text on the 272 held-out drawings, where chance gives 0.04
"""

from clipjax.config import Augment, Cosine, Data, ImageTower, Model, Optim, Retrieval, Run, TextTower, Train

SHAPE = dict(width=128, heads=2, mlp_dim=512, embed_dim=128)


def config() -> Run:
    return Run(
        # Each visit draws one of a drawing's captions: what it is, that with keywords, or a description.
        data=Data(spec="wds:openclipart/wds/train-*.tar", text_field="json.captions", augment=Augment(crop=0.7)),
        model=Model(
            image=ImageTower(image_size=48, patch_size=12, depth=4, **SHAPE),
            text=TextTower(length=24, vocab_size=4000, depth=3, **SHAPE),
            dtype="float32",  # CPUs are slower in bfloat16
            unroll=4,
        ),
        optim=Optim(lr=1e-3, weight_decay=0.1, clip_norm=1.0, schedule=Cosine(warmup=20)),
        train=Train(steps=240, batch_size=256, log_every=10, checkpoint_every=120),
        evals=(Retrieval(data="wds:openclipart/wds/test-*.tar", text_field="txt", every=120),),
    )
