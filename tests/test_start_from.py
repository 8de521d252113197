"""`start_from`: a configuration that has model, tokenizer and preprocessing of the run that it starts from."""

import dataclasses
import math

import pytest

from clipjax import config
from clipjax.config import (
    BPE,
    Caption,
    ConfigError,
    Data,
    Decoder,
    ImageTower,
    Init,
    Lora,
    Model,
    Run,
    Sigmoid,
    Softmax,
    TextTower,
    TokenizerFile,
    start_from,
)

CLIP = Model(image=ImageTower.clip("B/16", activation="quick_gelu"), text=TextTower.clip("B"), dtype="float32")
SIGLIP = Model(image=ImageTower.siglip("B/16"), text=TextTower.siglip("B"), init_bias=-12.0, max_scale=None)
COCA = Model(image=ImageTower.coca("B/18"), text=TextTower.coca("B"), decoder=Decoder.coca("B"))
PAIRS = dict(spec="tsv:pairs.tsv")


def saved(folder, model, **changes):
    """A workdir, as far as a configuration reads it."""
    bias = [Softmax() if model.init_bias is None else Sigmoid()]
    run = Run(**dict(data=Data(spec="tsv:old.tsv", resize="crop"), model=model, objective=bias) | changes)
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json(run))
    return str(folder)


def test_it_is_a_plain_config(tmp_path):
    before = saved(tmp_path / "run", CLIP, tokenizer=BPE(clean="web"), optim=config.Optim(lr=7), seed=9)
    run = start_from(f"{before}@7", data=PAIRS)
    words = TokenizerFile(path=f"{before}/tokenizer.json", clean="web")
    assert run == Run(data=Data(**PAIRS, resize="crop"), model=CLIP, tokenizer=words, init=Init(run=f"{before}@7"))
    assert config.from_json(config.to_json(run)) == run
    assert start_from(tmp_path / "run", data=PAIRS).init == Init(run=before)


def test_what_changes(tmp_path):
    """A dict changes what it names, and anything else takes the field's place."""
    run = saved(tmp_path / "run", CLIP)
    made = start_from(
        run,
        data=Data(**PAIRS),
        model=dict(image=dict(image_size=336, lora=Lora(rank=4)), dtype="bfloat16"),
        optim=dict(lr=1e-5),
        train=config.Train(steps=3000),
        init=dict(allow=("decoder/.*",)),
        seed=3,
    )
    image = dataclasses.replace(CLIP.image, image_size=336, lora=Lora(rank=4))
    assert made.model == dataclasses.replace(CLIP, image=image, dtype="bfloat16")
    assert (made.data.resize, made.optim, made.seed) == ("squash", config.Optim(lr=1e-5), 3)
    assert made.init == Init(run=run, allow=("decoder/.*",))
    again = start_from(saved(tmp_path / "adapted", made.model), data=PAIRS)
    assert again.model.image == dataclasses.replace(image, lora=None)  # its adapters are merged


@pytest.mark.parametrize(
    ("model", "objective", "want", "scalars"),
    [
        (CLIP, None, (Softmax(),), (None, 1 / 0.07, 100.0)),
        (CLIP, (Sigmoid(),), (Sigmoid(),), (-10.0, 10.0, None)),
        (SIGLIP, None, (Sigmoid(),), (-12.0, 1 / 0.07, None)),
        (SIGLIP, (Softmax(),), (Softmax(),), (None, 1 / 0.07, None)),
        (COCA, None, (Softmax(), Caption()), (None, 1 / 0.07, 100.0)),
    ],
)
def test_the_bias_follows_the_objective(tmp_path, model, objective, want, scalars):
    given = {} if objective is None else dict(objective=objective)
    run = start_from(saved(tmp_path / "run", model), data=PAIRS, **given)
    assert run.objective == want
    assert (run.model.init_bias, run.model.init_scale, run.model.max_scale) == scalars
    given = start_from(saved(tmp_path / "same", CLIP), data=PAIRS, objective=(Sigmoid(),), model=dict(init_bias=-3.0))
    assert (given.model.init_bias, given.model.max_scale) == (-3.0, 100.0)


def test_towers_of_two_runs(tmp_path):
    alone = dataclasses.replace(CLIP, towers="image")
    image = saved(tmp_path / "image", alone)
    text = saved(
        tmp_path / "text", dataclasses.replace(CLIP, text=dataclasses.replace(CLIP.text, depth=3)), tokenizer=BPE(clean="web")
    )
    run = start_from(text, init=dict(image=image), data=PAIRS)
    assert (run.model.image, run.model.text.depth, run.model.towers) == (CLIP.image, 3, "both")
    assert run.tokenizer == TokenizerFile(path=f"{text}/tokenizer.json", clean="web")
    one = start_from(image, init=Init(image=image), data=PAIRS, model=dict(text=dict(depth=5)))
    assert (one.tokenizer, one.model.text.depth, one.model.init_scale) == (BPE(), 5, pytest.approx(1 / 0.07))
    with pytest.raises(ConfigError, match=r"^model\.towers = 'image': there is no text tower; .* by init\.image$"):
        start_from(image, data=PAIRS)


def test_nonsense_is_refused(tmp_path):
    run = saved(tmp_path / "run", CLIP)
    for make, message in (
        (lambda: start_from("nowhere", data=PAIRS), r"^init\.run = 'nowhere': is not a workdir"),
        (lambda: start_from(run), r"^data\.spec = '': must be emoji, "),
        (lambda: start_from(run, data=PAIRS, optm=dict(lr=1)), r"^optm = .*: Run has no such field; the nearest is optim$"),
        (lambda: start_from(run, data=PAIRS, model=dict(image=dict(sise=3))), r"^model\.image\.sise = 3: .*nearest is "),
        (lambda: start_from(run, data=PAIRS, init=dict(image="nowhere")), r"^init\.image = 'nowhere': is not a workdir"),
        (lambda: start_from(run, data=PAIRS, optim=dict(lr=math.nan)), r"^optim\.lr = nan"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
