"""SigLIP ViT-B/16 at 224 px (2303.15343): 40 billion examples.

Run:      clipjax train siglip_b16 --workdir RUN --tokenizer.path FILE
Needs:    a tokenizer.json of at most 32,000 tokens (SigLIP's own is of C4: timm/ViT-B-16-SigLIP on Hugging Face), and pairs:
          SigLIP's, WebLI, are not public; LAION-400M is prepared by `tfds build laion400m/images --file_format=array_record`; for
          others --data.spec
Topology: v5e:16x16
Memory:   1.49 GiB a chip as compiled
Cost:     not yet run; 3.2 days at 40 % of the chips' bf16 peak
Expected: zero-shot ImageNet on WebLI 76.2 % (2303.15343), 76.04 % where open_clip measured it (docs/openclip_results.csv), by
          `clipjax eval zeroshot RUN --data tfds:imagenet2012 --split validation --templates imagenet`
"""

from clipjax.config import Cosine, Data, ImageTower, Model, Optim, Rule, Run, Sigmoid, TextTower, TokenizerFile, Train


def config() -> Run:
    return Run(
        data=Data(spec="tfds:laion400m/images", workers=32),
        tokenizer=TokenizerFile(path="tokenizer.json"),
        model=Model(
            # GELU is the exact one, as in open_clip's towers of this shape: then an export computes the same function.
            image=ImageTower.siglip("B/16"),
            text=TextTower.siglip("B"),
            init_scale=10.0,
            max_scale=None,
            init_bias=-10.0,
            remat="full",  # the least memory; auto takes what is fastest of what fits: mlp, 3 % faster for twice the memory
        ),
        objective=(Sigmoid(),),
        optim=Optim(
            lr=1e-3,
            b2=0.95,
            eps=1e-8,
            # 1e-4 in the paper: big_vision does not multiply it by the peak learning rate (big_vision/optax.py), clipjax does.
            weight_decay=0.1,
            clip_norm=1.0,
            mu_dtype="bfloat16",
            # Batch, warm-up, cosine and number of examples are from SigLIP 2 (2502.14786); the code of SigLIP has no such config.
            schedule=Cosine(warmup=20_000),
            rules=(Rule(pattern=".*/kernel"), Rule(pattern=".*", decay=0.0)),  # unlike CLIP's, token embeddings do not decay
        ),
        train=Train(steps=1_220_703, batch_size=32_768, log_every=100, checkpoint_every=2500),
    )
