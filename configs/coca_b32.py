"""CoCa of ViT-B/32 at 224 px in open_clip's form (2205.01917; open_clip's coca_ViT-B-32): 13 billion pairs in batches of 90,112.

Run:      clipjax train coca_b32 --workdir RUN --tokenizer.path FILE
Needs:    a tokenizer.json of at most 49,408 tokens with a start token and an end token of the highest id (CLIP's own:
          openai/clip-vit-base-patch32 on Hugging Face), and pairs: open_clip's, LAION-2B, are not public any more; LAION-400M is
          prepared by `tfds build laion400m/images --file_format=array_record`; for others --data.spec
Topology: v5e:16x16
Memory:   7.25 GiB a chip as compiled
Cost:     not yet run; 0.74 days at 40 % of the chips' bf16 peak
Expected: zero-shot ImageNet 63.31 % on LAION-2B, as open_clip measured its own (docs/openclip_results.csv), by
          `clipjax eval zeroshot RUN --data tfds:imagenet2012 --split validation --templates imagenet`
"""

from clipjax.config import (
    Augment,
    Caption,
    Cosine,
    Data,
    Decoder,
    ImageTower,
    Model,
    Optim,
    Run,
    Softmax,
    TextTower,
    TokenizerFile,
    Train,
)


def config() -> Run:
    return Run(
        data=Data(spec="tfds:laion400m/images", resize="crop", augment=Augment(crop=0.9), workers=32),
        tokenizer=TokenizerFile(path="tokenizer.json"),
        model=Model(
            image=ImageTower.clip("B/32", pool="single"),
            text=TextTower.clip("B", length=76, pool="cls", legacy_mask=True),
            decoder=Decoder(depth=12, heads=8, mlp_dim=2048, mlps=2),
        ),
        # The loss weights are open_clip's defaults, with 2 for captions. Batch and pairs come from the name of its model,
        # laion2b_s13b_b90k. We found no source for its learning rate: betas and decay are CLIP's, the rate is open_clip's usual
        # one for such batches.
        objective=(Softmax(), Caption(weight=2.0)),
        optim=Optim(lr=1e-3, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2, schedule=Cosine(warmup=2000)),
        train=Train(steps=144_264, batch_size=90_112, log_every=100, checkpoint_every=2500),
    )
