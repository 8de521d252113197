"""CLIPA-v2 ViT-H/14 (2305.07017, 2306.15658): the pre-training stage, 12.8 billion pairs at 84 px with 8 text tokens.

Run:      clipjax train clipa_h14 --workdir RUN --tokenizer.path FILE
Needs:    a tokenizer.json of at most 32,000 tokens (CLIPA's own: bert-base-uncased on Hugging Face), and LAION-400M, prepared by
          `tfds build laion400m/images --file_format=array_record`; for other pairs --data.spec
Topology: v5e:16x16
Memory:   5.44 GiB a chip as compiled
Cost:     not yet run; 1.1 days at 40 % of the chips' bf16 peak
Expected: zero-shot ImageNet, before fine-tuning at 224 px, 72.1 % on LAION-2B, 75.6 % on DataComp-1B (clipa_jax/README.MD), by
          `clipjax eval zeroshot RUN --data tfds:imagenet2012 --split validation --templates imagenet`
"""

from clipjax.config import Augment, Cosine, Data, ImageTower, Mesh, Model, Optim, Rule, Run, TextTower, TokenizerFile, Train


def config() -> Run:
    # Sources: clipa_jax/configs/model_h/84_8_pre_training.py and, for the towers, clipa_jax/models. Differences: captions lose
    # their ends, where CLIPA keeps nouns. All images get colour jitter, where CLIPA's get it in 80 % of cases, with hue, and 20 %
    # become grey. The image tower has no class token; CLIPA's patches attend to one, which it does not use otherwise. The last
    # normalisation of the image tower comes before the mean over the patches, not after.
    flax = dict(activation="gelu_tanh", norm_eps=1e-6)
    return Run(
        data=Data(
            spec="tfds:laion400m/images",
            resize="crop",
            augment=Augment(crop=0.4, brightness=0.32, contrast=0.32, saturation=0.32),
            workers=32,
        ),
        tokenizer=TokenizerFile(path="tokenizer.json"),
        model=Model(
            image=ImageTower.clip(
                "H/14",
                image_size=84,
                pool="mean",
                positions="sincos2d",
                pre_norm=False,
                mean=(0.485, 0.456, 0.406),
                std=(0.229, 0.224, 0.225),
                **flax,
            ),
            text=TextTower.clip("H", length=8, vocab_size=32_000, causal=False, pool="last", **flax),
            max_scale=None,
        ),
        optim=Optim(
            lr=8e-6 * 65_536 / 256,  # the rate for a batch of 256, times the number of such batches
            b2=0.95,
            eps=1e-8,
            weight_decay=0.2,  # multiplied by lr, as here: CLIPA replaced big_vision's order by PyTorch's (optim/build_optax.py)
            mu_dtype="bfloat16",
            schedule=Cosine(warmup=3200),  # with fewer steps it collapsed, says CLIPA's config
            rules=(Rule(pattern=".*/kernel"), Rule(pattern=".*", decay=0.0)),
        ),
        train=Train(steps=195_490, batch_size=65_536, log_every=100, checkpoint_every=1000),
        mesh=Mesh(data=-1, fsdp=16),  # one side of the pod's torus; use --mesh.fsdp for fewer chips
    )
