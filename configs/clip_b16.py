"""CLIP ViT-B/16 at 224 px (2103.00020): 32 epochs of 400 million pairs, 12.8 billion in all.

Run:      clipjax train clip_b16 --workdir RUN --tokenizer.path FILE
Needs:    a tokenizer.json of at most 49,408 tokens (CLIP's own: openai/clip-vit-base-patch32 on Hugging Face), and LAION-400M,
          prepared by `tfds build laion400m/images --file_format=array_record`; for other pairs --data.spec
Topology: v5e:16x16
Memory:   3.31 GiB a chip as compiled
Cost:     not yet run; 0.9 days at 40 % of the chips' bf16 peak
Expected: zero-shot ImageNet 68.6 % on OpenAI's data (2103.00020), 67.07 % on LAION-400M (open_clip, docs/PRETRAINED.md), by
          `clipjax eval zeroshot RUN --data tfds:imagenet2012 --split validation --templates imagenet`
"""

from clipjax.config import Augment, Cosine, Data, ImageTower, Model, Optim, Run, TextTower, TokenizerFile, Train


def config() -> Run:
    return Run(
        # The paper's only augmentation is a random square crop. It does not say of which area; open_clip takes 0.9 to 1.
        data=Data(spec="tfds:laion400m/images", resize="crop", augment=Augment(crop=0.9), workers=32),
        tokenizer=TokenizerFile(path="tokenizer.json"),
        model=Model(image=ImageTower.clip("B/16"), text=TextTower.clip("B")),
        # Tables 19 and 20 of the paper; open_clip's params.py has the same rate and betas, and a default warm-up of 10,000.
        optim=Optim(lr=5e-4, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2, schedule=Cosine(warmup=2000)),
        train=Train(steps=390_625, batch_size=32_768, log_every=100, checkpoint_every=2500),
    )
