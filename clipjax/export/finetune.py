"""A configuration beside an imported run, ready to fine-tune it."""

from pathlib import Path

from clipjax.config.start import TOKENIZER
from clipjax.files import write_atomic

FINETUNE = "finetune.py"
TEXT = '''"""Fine-tunes the weights beside this file.

    clipjax train {file} --workdir RUN

Set data to your own pairs. The evaluation of step 0 is that of the imported weights. Not yet run.
"""

from pathlib import Path

from clipjax.config import Cosine, Optim, Retrieval, Run, Train, start_from


def config() -> Run:
    return start_from(
        Path(__file__).parent,  # the model, its {tokenizer}, and how images become square
        # Your pairs, as dict(spec="tsv:pairs.tsv", split="train#0-95"); Retrieval(split="train#95-100") are then the others.
        data=dict(spec="emoji"),
        # model=dict(dtype="bfloat16"): faster on GPUs and TPUs. model=dict(image=dict(image_size=336)): another resolution.
        optim=Optim(lr=1e-5, weight_decay=0.1, schedule=Cosine(warmup=50)),
        train=Train(steps=1000, batch_size=256, log_every=10, checkpoint_every=200),
        evals=(Retrieval(every=200),),
    )
'''


def write_finetune(out: Path) -> Path:
    """Writes the configuration into the workdir `out`; its file."""
    file = out / FINETUNE
    with write_atomic(file) as part:
        part.write_text(TEXT.format(file=file, tokenizer=TOKENIZER), encoding="utf-8")
    return file
