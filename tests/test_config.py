"""Configurations: exact as JSON, strict about what they are given, and of the published sizes."""

import dataclasses
import json
import math
import re

import jax
import pytest

from clipjax import config
from clipjax.config import ConfigError, Data, ImageTower, Model, Run, TextTower
from clipjax.models import clip
from configs import emoji_clip

SIGLIP = Model(image=ImageTower.siglip("B/16"), text=TextTower.siglip("B"), init_scale=10.0, max_scale=None, init_bias=-10.0)
RUNS = {
    "defaults": Run(data=Data(spec="emoji")),
    "emoji_clip": emoji_clip.config(),
    "siglip": Run(data=Data(spec="emoji"), model=SIGLIP, objective=(config.Sigmoid(weight=0.5),), seed=2**32 - 1),
    "both losses": Run(data=Data(spec="emoji"), model=SIGLIP, objective=(config.Softmax(weight=0.25), config.Sigmoid())),
    "every other term": Run(
        data=config.Data(spec="emoji", captions_per_image=2, ids="caption", teacher="teacher.npz"),
        objective=(
            config.Softmax(image_weight=0.75, label_smoothing=0.1, reduction="sum", prefixes=(16, 64, 512)),
            config.Decoupled(sigma=0.5, stop_gradient=True),
            config.HardNegative(alpha=0.0, beta=0.5, prefixes=(512,)),
            config.MultiPositive(weight=0.0),
            config.Cwcl(frozen="text"),
            config.Cyclip(in_modal=0.5, cross_modal=0.0),
            config.Distillation(teacher_scale=20.0),
            config.Preserve(weight=0.05, mse=2.0, cosine=0.0),
        ),
    ),
    "cuaxu": Run(data=Data(spec="emoji"), objective=config.CUAXU),
    "file, rsqrt": Run(
        data=Data(spec="emoji"),
        tokenizer=config.TokenizerFile(path="words/tokenizer.json"),
        optim=config.Optim(kind="adafactor", schedule=config.Rsqrt(warmup=5, timescale=7, cooldown=9), clip_norm=1.0, ema=0.99),
    ),
    "bpe, constant": Run(
        data=Data(spec="emoji"),
        tokenizer=config.BPE(lowercase=False),
        optim=config.Optim(schedule=config.Constant(warmup=5, cooldown=9), rules=(config.Rule(pattern=".*", lr=0.1, decay=0.0),)),
    ),
    "evaluations": Run(
        evals=(
            config.Zeroshot(data="emoji", templates="plain", classnames="names.txt"),
            config.Retrieval(data="emoji", every=7),
            config.Geometry(data="emoji", split="train"),
            config.Probe(data="emoji", methods=("knn", "linear"), features="tower", label_pattern="(a|b) tone"),
            config.Transfer(data="emoji", noise=2.0),
            config.Calibration(data="emoji"),
        ),
        train=config.Train(best="zeroshot_retrieval/image_retrieval_recall@1"),
        data=config.Data(spec="tsv:a.tsv", image_field="filepath", worker_kind="processes", augment=config.Augment(crop=0.1)),
        mesh=config.Mesh(data=2, fsdp=-1, tensor=2),
    ),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_json_is_exact(run):
    again = config.from_json(config.to_json(run))
    assert again == run
    assert again.objective == run.objective
    assert [type(x) for x in (*again.objective, *again.evals)] == [type(x) for x in (*run.objective, *run.evals)]
    assert type(again.optim.schedule) is type(run.optim.schedule)
    assert config.to_json(again) == config.to_json(run)
    assert config.lines(again) == config.lines(run)


def edited(path: str, change) -> str:
    """The JSON of a run, with a change made to the mapping at a path."""
    tree = json.loads(config.to_json(dataclasses.replace(RUNS["both losses"], evals=(config.Zeroshot(), config.Retrieval()))))
    here = tree
    for part in path.split("."):
        here = here[int(part) if part.isdigit() else part] if part else here
    change(here)
    return json.dumps(tree)


WRONG_JSON = {
    "unknown": ("", lambda x: x.update(sed=1), r"^config\.json: sed = 1: Unexpected"),
    "unknown, deep": ("model.image", lambda x: x.update(imagesize=1), r"model\.image\.imagesize = 1: Unexpected"),
    "unknown in a union": (
        "objective.1",
        lambda x: x.update(wieght=1),
        r"^config\.json: objective\.1\.sigmoid\.wieght = 1: [^;]*$",
    ),
    "missing kind": ("objective.1", lambda x: x.pop("kind"), r"^config\.json: objective\.1\.kind: is missing$"),
    "missing kind of schedule": ("optim.schedule", lambda x: x.pop("kind"), r"optim\.schedule\.kind: is missing$"),
    "missing kind of tokenizer": ("tokenizer", lambda x: x.pop("kind"), r"tokenizer\.kind: is missing$"),
    "missing kind of evaluation": ("evals.0", lambda x: x.pop("kind"), r"evals\.0\.kind: is missing$"),
    "missing pattern": ("optim.rules.0", lambda x: x.pop("pattern"), r"^config\.json: optim\.rules\.0\.pattern: is missing$"),
    "other kind": ("objective.0", lambda x: x.update(kind="hinge"), r"objective\.0 = .*'hinge'.*'softmax', 'sigmoid'"),
    "text for a number": ("", lambda x: x.update(seed="1"), r"seed = '1': .*integer"),
    "fraction for a whole number": ("train", lambda x: x.update(steps=10.5), r"train\.steps = 10\.5: .*integer"),
    "number for a truth": ("data.augment", lambda x: x.update(flip=1), r"data\.augment\.flip = 1: .*boolean"),
    "other literal": ("model", lambda x: x.update(dtype="float16"), r"model\.dtype = 'float16': .*'float32' or 'bfloat16'"),
    "two colours": ("model.image", lambda x: x["mean"].pop(), r"model\.image\.mean\.2: is missing"),
    "null": ("optim", lambda x: x.update(lr=None), r"optim\.lr = None: .*number"),
    "damaged list of classes": ("", lambda x: x.update(registered=3), r"^config\.json: registered = 3: .*dictionary"),
    "damaged list of terms": ("", lambda x: x.update(registered={"objective": 3}), r"registered\.objective = 3: .*dictionary"),
    "damaged class": (
        "",
        lambda x: x.update(registered={"evals": {"mine": None}}),
        r"registered\.evals\.mine = None: .*dictionary",
    ),
    "class without a file": (
        "",
        lambda x: x.update(registered={"objective": {"mine": {}}}),
        r"uses the class mine of .*--config",
    ),
    "two errors": ("train", lambda x: x.update(steps="a", keep="b"), r"train\.steps = 'a': .*; train\.keep = 'b': "),
    "impossible": (
        "model.image",
        lambda x: x.update(image_size=15),
        r"^config\.json: model\.image\.image_size = 15: must be at least",
    ),
}


@pytest.mark.parametrize(("path", "change", "message"), WRONG_JSON.values(), ids=WRONG_JSON.keys())
def test_wrong_json_is_refused_by_field(path, change, message):
    with pytest.raises(ConfigError, match=message):
        config.from_json(edited(path, change))


@pytest.mark.parametrize(("text", "message"), [("{", "Invalid JSON"), ("[]", "should be an object"), ("", "Invalid JSON")])
def test_what_is_no_json_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        config.from_json(text)


def test_a_field_that_an_older_file_lacks_has_its_default():
    text = edited("train", lambda x: x.pop("eval_batch_size"))
    assert config.from_json(text).train.eval_batch_size == config.Train().eval_batch_size


def tower(**changes):
    return lambda: Model(image=ImageTower(**changes))


def words(**changes):
    return lambda: Model(text=TextTower(**changes))


def optim(**changes):
    return lambda: config.Optim(**changes)


def best(name, *evals):
    return lambda: Run(data=Data(spec="emoji"), train=config.Train(best=name), evals=evals)


def terms(*objective, **changes):
    return lambda: Run(**(dict(data=config.Data(spec="emoji"), objective=objective) | changes))


def schedule(kind, **changes):
    return lambda: Run(data=Data(spec="emoji"), optim=config.Optim(schedule=kind(**changes)), train=config.Train(steps=100))


REFUSED = {
    "size": (lambda: ImageTower.clip("XL/16"), "size = 'XL': use one of Ti, S, M, B"),
    "image width": (tower(width=0), r"model\.image\.width = 0: must be positive"),
    "image depth": (tower(depth=-1), r"model\.image\.depth = -1: must be positive"),
    "heads": (tower(heads=0), r"model\.image\.heads = 0: must be positive"),
    "text mlp": (words(mlp_dim=0), r"model\.text\.mlp_dim = 0: must be positive"),
    "image heads": (tower(heads=5), r"model\.image\.width = 768: must be a multiple of heads = 5"),
    "text heads": (words(heads=3), r"model\.text\.width = 512: must be a multiple of heads = 3"),
    "no embedding": (tower(embed_dim=0), r"model\.image\.embed_dim = 0: must be positive or None"),
    "patch": (tower(image_size=15), r"model\.image\.image_size = 15: must be at least model\.image\.patch_size = 16"),
    "norm of a mean": (tower(norm_pooled=True), r"model\.image\.norm_pooled = True: applies to the means"),
    "high end": (
        words(pool="eos", eos_id=49408),
        r"model\.text\.eos_id = 49408: must be an id below model\.text\.vocab_size = 49408",
    ),
    "no patch": (tower(patch_size=0), r"model\.image\.patch_size = 0: must be positive"),
    "no image size": (tower(image_size=0), r"model\.image\.image_size = 0: must be positive"),
    "negative image size": (tower(image_size=-224), r"model\.image\.image_size = -224: must be positive"),
    "patch of letters": (lambda: ImageTower.clip("B/x"), r"size = 'B/x': must name the patch too, in pixels: as B/16$"),
    "empty patch": (lambda: ImageTower.clip("B/", patch_size=16), r"size = 'B/': must name the patch too"),
    "patch left out": (lambda: ImageTower.clip("H"), r"size = 'H': must name the patch too, in pixels: as B/16$"),
    "SigLIP's patch left out": (lambda: ImageTower.siglip("L"), r"size = 'L': must name the patch too"),
    "image norm": (tower(norm_eps=-1e-5), r"model\.image\.norm_eps = -1e-05: must not be negative"),
    "text norm": (words(norm_eps=-1e-5), r"model\.text\.norm_eps = -1e-05: must not be negative"),
    "drop all": (tower(patch_dropout=1.0), r"model\.image\.patch_dropout = 1\.0: must lie in \[0, 1\)"),
    "drop none": (tower(patch_dropout=-0.1), r"model\.image\.patch_dropout = -0\.1: must lie in \[0, 1\)"),
    "sincos": (tower(positions="sincos2d", width=66, heads=3), r"model\.image\.width = 66: must be a multiple of 4 for sincos2d"),
    "length": (words(length=2), r"model\.text\.length = 2: must be at least 3"),
    "vocabulary": (words(vocab_size=3), r"model\.text\.vocab_size = 3: must leave room"),
    "bias of nothing": (
        words(embed_dim=None, projection_bias=True),
        r"model\.text\.projection_bias = True: needs model\.text\.embed_dim",
    ),
    "image bias of nothing": (
        lambda: ImageTower.siglip("B/16", projection_bias=True),
        r"model\.image\.projection_bias = True: needs model\.image\.embed_dim",
    ),
    "embedding widths": (words(embed_dim=256), r"model\.text\.embed_dim = 256: must equal .* width 512"),
    "unprojected widths": (
        lambda: Model(image=ImageTower.siglip("B/16"), text=TextTower(embed_dim=None)),
        r"model\.text\.embed_dim = 512: must equal the image tower's embedding width 768",
    ),
    "scale": (lambda: Model(init_scale=0.0), r"model\.init_scale = 0\.0: must be positive"),
    "scale above": (lambda: Model(init_scale=200.0), r"model\.init_scale = 200\.0: must lie in \[1, max_scale = 100\.0\]"),
    "scale below": (lambda: Model(init_scale=0.5), r"model\.init_scale = 0\.5: must lie in \[1, max_scale = 100\.0\]"),
    "unroll": (lambda: Model(unroll=0), r"model\.unroll = 0: must be at least 1"),
    "part": (lambda: Model(part=0), r"model\.part = 0: must be a number of tokens, at least 1, or None"),
    "crop": (lambda: config.Augment(crop=0.0), r"data\.augment\.crop = 0\.0: must lie in \(0, 1\]"),
    "aspect": (lambda: config.Augment(aspect=0.9), r"data\.augment\.aspect = 0\.9: must be at least 1"),
    "border": (lambda: config.Augment(border=-0.1), r"data\.augment\.border = -0\.1: must lie in \[0, 1\]"),
    "brightness": (lambda: config.Augment(brightness=1.0), r"data\.augment\.brightness = 1\.0: must lie in \[0, 1\)"),
    "contrast": (lambda: config.Augment(contrast=-0.1), r"data\.augment\.contrast = -0\.1: must lie in \[0, 1\)"),
    "saturation": (lambda: config.Augment(saturation=2.0), r"data\.augment\.saturation = 2\.0: must lie in \[0, 1\)"),
    "hue": (lambda: config.Augment(hue=0.6), r"data\.augment\.hue = 0\.6: must lie in \[0, 0\.5\]"),
    "jitter": (lambda: config.Augment(jitter=1.1), r"data\.augment\.jitter = 1\.1: must lie in \[0, 1\]"),
    "gray": (lambda: config.Augment(gray=-0.1), r"data\.augment\.gray = -0\.1: must lie in \[0, 1\]"),
    "blur of a view": (lambda: config.View(blur=2.0), r"data\.views\.blur = 2\.0: must lie in \[0, 1\]"),
    "views beside an augmentation": (
        lambda: Data(spec="emoji", views=(config.View(),), augment=config.Augment(flip=True)),
        r"data\.augment = Augment\(.*\): leave it out: each of data\.views has its own",
    ),
    "views beside a part's augmentation": (
        lambda: Data(sources=(config.Part(spec="emoji", augment=config.Augment()),), views=(config.View(),)),
        r"data\.sources\.augment = Augment\(.*\): leave it out: each of data\.views has its own",
    ),
    "deleted words": (lambda: config.TextAugment(delete=1.5), r"data\.text_augment\.delete = 1\.5: must lie in \[0, 1\]"),
    "swapped words": (lambda: config.TextAugment(swap=-1.0), r"data\.text_augment\.swap = -1\.0: must lie in \[0, 1\]"),
    "copies": (lambda: config.TextAugment(count=-1), r"data\.text_augment\.count = -1: must not be negative"),
    "places of captions": (lambda: Data(spec="emoji", captions=(1, 1)), r"data\.captions = \(1, 1\): must be different places"),
    "place of a caption": (lambda: Data(spec="emoji", captions=(-1,)), r"data\.captions = \(-1,\): must be different places"),
    "a draw beside places": (
        lambda: Data(spec="emoji", captions=(0, 1), captions_per_image=2),
        r"data\.captions_per_image = 2: leave it out: data\.captions say",
    ),
    "workers": (lambda: config.Data(spec="emoji", workers=0), r"data\.workers = 0: must be positive"),
    "no captions": (lambda: config.Data(spec="emoji", captions_per_image=0), r"data\.captions_per_image = 0: must be positive"),
    "lr": (optim(lr=0.0), r"optim\.lr = 0\.0: must be positive"),
    "lr nan": (optim(lr=math.nan), r"optim\.lr = nan: must be a finite number"),
    "b1": (optim(b1=1.0), r"optim\.b1 = 1\.0: must lie in \[0, 1\)"),
    "b2": (optim(b2=-0.5), r"optim\.b2 = -0\.5: must lie in \[0, 1\)"),
    "eps": (optim(eps=-1e-8), r"optim\.eps = -1e-08: must not be negative"),
    "weight decay": (optim(weight_decay=-0.1), r"optim\.weight_decay = -0\.1: must not be negative"),
    "clip norm": (optim(clip_norm=0.0), r"optim\.clip_norm = 0\.0: must be positive or None"),
    "ema": (optim(ema=1.0), r"optim\.ema = 1\.0: must lie in \(0, 1\) or be None"),
    "pattern": (
        optim(rules=(config.Rule(pattern=".*"), config.Rule(pattern="(a"))),
        r"optim\.rules\.1\.pattern = '\(a': is not a regular expression: ",
    ),
    "rule lr": (
        optim(rules=(config.Rule(pattern=".*", lr=-1.0),)),
        r"optim\.rules\.0\.lr = -1\.0: .*must not be negative; 0 turns",
    ),
    "rule decay": (optim(rules=(config.Rule(pattern=".*", decay=-1.0),)), r"optim\.rules\.0\.decay = -1\.0: .*must not be neg"),
    "axis": (lambda: config.Mesh(fsdp=0), r"mesh\.fsdp = 0: must be positive, or -1"),
    "two axes left": (lambda: config.Mesh(fsdp=-1), r"mesh = \{'data': -1, 'fsdp': -1, 'tensor': 1\}: only one axis can be -1"),
    "zeroshot": (lambda: config.Zeroshot(every=0), r"evals\.Zeroshot\.every = 0: must be positive"),
    "retrieval": (lambda: config.Retrieval(every=-5), r"evals\.Retrieval\.every = -5: must be positive"),
    "geometry": (lambda: config.Geometry(every=0), r"evals\.Geometry\.every = 0: must be positive"),
    "best where less is more": (
        best("geometry/alignment", config.Geometry()),
        r"train\.best = 'geometry/alignment': no evaluation of this run gives it; the nearest is geometry/",
    ),
    **{
        name: (lambda name=name: config.Train(**{name: 0}), rf"train\.{name} = 0: must be positive")
        for name in ("steps", "batch_size", "micro_batches", "log_every", "checkpoint_every", "keep", "eval_batch_size")
    },
    "keep_every": (lambda: config.Train(keep_every=0), r"train\.keep_every = 0: must be positive or None"),
    "keep_every between two checkpoints": (
        lambda: config.Train(keep_every=1500),
        r"train\.keep_every = 1500: must be a multiple of train\.checkpoint_every = 1000: only what is saved can be kept",
    ),
    "seed": (lambda: Run(data=Data(spec="emoji"), seed=-1), r"seed = -1: must lie in \[0, 2\^32\)"),
    "no objective": (lambda: Run(data=Data(spec="emoji"), objective=()), r"objective = \(\): needs at least one term"),
    "no weight": (
        lambda: Run(data=Data(spec="emoji"), objective=(config.Softmax(weight=0.0),)),
        r"objective = \(0\.0,\): these are the weights: one",
    ),
    "no best": (best("acc1"), r"train\.best = 'acc1': no evaluation of this run gives it; evals needs one"),
    "misspelt best": (
        best("zeroshot_retrieval/image_retrieval_recal@1", config.Zeroshot(), config.Retrieval()),
        "train.best = 'zeroshot_retrieval/image_retrieval_recal@1': no .* the nearest is "
        "zeroshot_retrieval/image_retrieval_recall@1$",
    ),
    "best of another task": (
        best("zeroshot_classification/acc1", config.Retrieval()),
        "train.best = 'zeroshot_classification/acc1': no evaluation",
    ),
    "best of two": (
        best("zeroshot_classification/acc1", config.Zeroshot(), config.Zeroshot(data="tfds:cifar10")),
        "train.best = .*: several evaluations give it; the nearest is zeroshot_classification/emoji/test/acc1$",
    ),
    "best of twins": (
        best("zeroshot_classification/emoji/test/acc1", config.Zeroshot(), config.Zeroshot(templates="plain")),
        "train.best = .*: several evaluations give it; evals needs one, on data and split of its own$",
    ),
    "term weight": (terms(config.Softmax(weight=-1.0)), r"objective\.0\.weight = -1\.0: must not be negative, nor infinite"),
    "term weight inf": (
        lambda: config.Alignment(weight=math.inf),
        r"objective\.Alignment\.weight = inf: must be a finite number",
    ),
    "term weight, captions": (terms(config.Caption(weight=-1.0)), r"objective\.0\.weight = -1\.0: must not be negative"),
    "term weight nan": (lambda: config.Cwcl(weight=math.nan), r"objective\.Cwcl\.weight = nan: must be a finite number"),
    "image place": (
        terms(config.Softmax(images=(0, 1))),
        r"objective\.0\.images = \(0, 1\): must be different places.* 1 of them",
    ),
    "text place": (
        terms(config.Sigmoid(texts=())),
        r"objective\.0\.texts = \(\): must be different places, from 0; the data have 1",
    ),
    "two of a side": (terms(config.Alignment(sides="text-text")), r"objective\.0\.sides = 'text-text': takes two or more"),
    "unknown head": (
        terms(config.Softmax(head="a")),
        r"objective\.0\.head = 'a': must name model\.heads that have image and text:",
    ),
    "head of a side": (
        terms(config.Softmax(head=("a", "b")), model=Model(heads=(config.Head(name="a"), config.Head(name="b", side="image")))),
        r"objective\.0\.head = \('a', 'b'\): must name model\.heads that have image and text: a$",
    ),
    "prefixes of a head": (
        terms(config.Softmax(head="a", prefixes=(8,)), model=Model(heads=(config.Head(name="a"),))),
        r"objective\.0\.head = 'a': prefixes are of the model's own embeddings",
    ),
    "captions that are not there": (
        terms(config.Softmax(negatives="captions")),
        r"objective\.0\.texts = None: objective\.0\.negatives = 'captions' needs two captions or more",
    ),
    "negatives without labels": (
        terms(config.Softmax(negatives="same")),
        r"data\.labels = None: objective\.0\.negatives = 'same'",
    ),
    "negatives and smoothing": (
        terms(config.Softmax(negatives="captions", label_smoothing=0.1)),
        r"objective\.0\.label_smoothing = 0\.1: must be 0: it counts all others",
    ),
    "image weight without images": (
        terms(config.Softmax(sides="all", image_weight=0.75)),
        r"objective\.0\.image_weight = 0\.75: must be 0\.5: objective\.0\.sides has pairs without an image and a text",
    ),
    "targets without labels": (
        terms(config.Distillation(targets="labels", classes=9)),
        r"data\.labels = None: objective\.0\.targets",
    ),
    "targets of some labels": (
        terms(config.Distillation(targets="labels"), data=Data(spec="emoji", labels="own")),
        r"objective\.0\.classes = None: set the number of labels",
    ),
    "unused temperature": (
        terms(config.Softmax(), config.Alignment(temperature=1.0)),
        r"objective\.1\.temperature = 1\.0: leave it out",
    ),
    "temperature": (terms(config.Softmax(temperature=0.0)), r"objective\.0\.temperature = 0\.0: must be positive and finite"),
    "image weight": (terms(config.Softmax(image_weight=1.1)), r"objective\.0\.image_weight = 1\.1: must lie in \[0, 1\]"),
    "smoothing": (terms(config.Softmax(label_smoothing=1.0)), r"objective\.0\.label_smoothing = 1\.0: must lie in \[0, 1\)"),
    "sigma": (terms(config.Decoupled(sigma=0.0)), r"objective\.0\.sigma = 0\.0: must be positive and finite"),
    "alpha": (terms(config.HardNegative(alpha=-1.0)), r"objective\.0\.alpha = -1\.0: must not be negative"),
    "beta": (terms(config.HardNegative(beta=-0.1)), r"objective\.0\.beta = -0\.1: must not be negative"),
    "cyclip": (terms(config.Cyclip(cross_modal=-0.1)), r"objective\.0\.cross_modal = -0\.1: must not be negative"),
    "spread": (terms(config.Softmax(), config.CrossUniformity(t=0.0)), r"objective\.1\.t = 0\.0: must be positive and finite"),
    **{
        f"prefixes {widths}": (
            terms(config.Sigmoid(weight=0.0), config.Softmax(prefixes=widths), model=SIGLIP),
            rf"objective\.1\.prefixes = {re.escape(str(widths))}: must be one or more widths in ascending .* embedding's 768$",
        )
        for widths in ((), (0, 4), (8, 8), (8, 4), (8, 769))
    },
    "one positive": (
        terms(config.MultiPositive()),
        r"data\.captions_per_image = 1: objective\.0 needs several captions an image: set it to 2 or more, or data\.ids",
    ),
    "no teacher": (
        terms(config.Softmax(), config.Distillation()),
        r"data\.teacher = None: objective\.1 needs an \.npz that `clipjax embed` wrote",
    ),
    "no start": (
        terms(config.Softmax(), config.Preserve()),
        r"data\.teacher = None: objective\.1 needs an \.npz that `clipjax embed` wrote of these examples, with the weights of",
    ),
    "nothing preserved": (
        terms(config.Preserve(cosine=0.0), data=Data(spec="emoji", teacher="start.npz")),
        r"objective\.0\.cosine = 0\.0: mse or cosine must be positive",
    ),
    "sigmoid without bias": (
        lambda: Run(data=Data(spec="emoji"), objective=(config.Softmax(), config.Sigmoid())),
        r"model\.init_bias = None: objective\.1 is a sigmoid loss: set it",
    ),
    "cosine": (schedule(config.Cosine, warmup=100), r"optim\.schedule\.warmup = 100: must be less than train\.steps = 100"),
    "rsqrt": (
        schedule(config.Rsqrt, warmup=60, cooldown=41),
        r"optim\.schedule\.cooldown = 41: with a warm-up of 60 steps must fit",
    ),
    "constant": (
        schedule(config.Constant, warmup=101),
        r"optim\.schedule\.cooldown = 0: with a warm-up of 101 .* train\.steps = 100",
    ),
    "negative warm-up": (schedule(config.Cosine, warmup=-1), r"optim\.schedule\.warmup = -1: must not be negative"),
    "final": (schedule(config.Cosine, warmup=1, final=1.5), r"optim\.schedule\.final = 1\.5: must lie in \[0, 1\]"),
    "timescale": (schedule(config.Rsqrt, warmup=1, timescale=0), r"optim\.schedule\.timescale = 0: must be positive"),
    "negative cool-down": (
        schedule(config.Constant, warmup=1, cooldown=-1),
        r"optim\.schedule\.cooldown = -1: must not be negative",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_nonsense_is_refused_with_field_value_and_remedy(make, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        make()


FREE = {
    *(f"mesh.{name}" for name in ("data", "fsdp", "tensor", "shard_optimizer")),
    *(
        "data.workers",
        "data.worker_kind",
        "data.index",
        "data.prefetch_bytes",
        "data.max_bad",
        "model.remat",
        "model.part",
        "model.attention",
        "model.unroll",
    ),
    *(f"evals.0.{name}" for name in ("data", "split", "every", "image_field", "text_field", "label_field", "clean", "languages")),
    *(f"train.{name}" for name in ("micro_batches", "log_every", "checkpoint_every", "keep", "best", "eval_batch_size")),
    *("train.skip", "train.nonfinite", "train.nonfinite_max", "init"),
    "train.keep_every",
    "train.wandb",
}
OTHER = {  # a valid other value where adding or negating would not give one
    "model.image.image_size": 240, "model.image.patch_size": 14, "model.image.width": 780, "model.image.heads": 6,
    "model.image.embed_dim": None, "model.text.heads": 16, "model.text.embed_dim": None, "mesh.data": 4,
    "objective.0.dtype": "bfloat16", "evals.0.data": "emoji", "data.spec": "tfds:coco_captions", "mesh.shard_optimizer": True,
    "data.image_field": "picture", "data.text_field": "title", "data.ids": "caption", "data.teacher": "teacher.npz",
    "data.labels": "labels.npz",
    "optim.clip_norm": 1.0, "optim.ema": 0.5, "optim.b1": 0.5, "train.keep_every": 1000, "train.wandb": "team/project",
    "optim.b2": 0.5, "train.best": "zeroshot_retrieval/emoji/test/text_retrieval_recall@1", "model.init_bias": -10.0,
    "data.augment.crop": 0.5, "data.augment.brightness": 0.5, "data.augment.contrast": 0.5, "data.augment.saturation": 0.5,
    "data.augment.border": 0.1, "data.augment.hue": 0.1, "data.augment.jitter": 0.5, "data.augment.gray": 0.5,
    "data.augment.blur": 0.5, "data.captions": (0, 2),
    "model.image.patch_dropout": 0.5, "optim.schedule.final": 0.5, "optim.schedule.kind": "cosine",
    "data.resize": "crop", "data.worker_kind": "processes", "model.image.pool": "mean", "model.image.positions": "sincos2d",
    "model.image.activation": "quick_gelu", "model.text.activation": "quick_gelu", "model.text.pool": "last",
    "model.dtype": "float32", "model.remat": "full", "model.part": 512, "model.attention": "cudnn", "optim.kind": "lion",
    "optim.mu_dtype": "bfloat16",
    "model.image.mean": (0.5, 0.5, 0.5), "model.image.std": (0.5, 0.5, 0.5), "objective.0.label_smoothing": 0.5,
    "objective.0.sides": "all", "objective.0.images": (0,), "objective.0.texts": (0,),
    "objective.0.temperature": 0.1, "objective.0.reduction": "sum", "objective.0.prefixes": (64,),
    "train.skip": ((3, 5),), "train.nonfinite": "skip",
    "init": config.Init(run="runs/a@3", state="all"), "data.order": "windows", "data.resizer": "fast", "data.max_bad": 0.5,
    "data.label_field": "a", "data.index": "a", "data.filter.max_aspect": 2.0, "data.filter.max_characters": 9,
    "tokenizer.clean": "web", "evals.0.image_field": "a", "evals.0.text_field": "a", "evals.0.label_field": "a",
    "evals.0.clean": "web", "model.towers": "image", "optim.rules.0.layer_decay": 0.5, "optim.rules.1.layer_decay": 0.5,
    "model.image.unlock": 2, "model.text.unlock": 2, "evals.0.languages": ("en", "ja"),
}  # fmt: skip
BASE = Run(
    data=Data(spec="emoji", filter=config.Filter(number="a", at_least=0.5)),
    model=Model(image=ImageTower(embed_dim=768, pool="avg"), text=TextTower(width=768, heads=12, embed_dim=768, pool="cls")),
    evals=(config.Retrieval(),),
)


def changed(run: object, path: str, value: object) -> object:
    name, _, rest = path.partition(".")
    if isinstance(run, tuple):
        i = int(name)
        return (*run[:i], changed(run[i], rest, value) if rest else value, *run[i + 1 :])
    return dataclasses.replace(run, **{name: changed(getattr(run, name), rest, value) if rest else value})


def leaves():
    """Every field of a run, except the kinds, which are not changed without changing the class, and parts that are absent."""
    for line in config.lines(BASE):
        name, _, text = line.partition(" = ")
        if not name.endswith(
            (
                "objective.0.kind",
                "objective.0.head",
                "objective.0.negatives",
                "tokenizer.kind",
                "schedule.kind",
                "evals.0.kind",
                "model.decoder",
                "model.heads",
                "model.classes",
                "data.sources",
                "data.views",
                ".lora",
                "data.embeddings",
            )
        ):
            yield name, text


@pytest.mark.parametrize("name", [name for name, _ in leaves()])
def test_every_field_is_identity_unless_it_is_marked_free(name):
    before = dict(leaves())[name]
    part = BASE
    for key in name.split("."):
        part = part[int(key)] if isinstance(part, tuple) else getattr(part, key)
    if name in OTHER:
        value = OTHER[name]
    elif isinstance(part, bool):
        value = not part
    elif isinstance(part, str):
        value = part + "x"
    else:
        value = part * 2 or type(part)(1)
    differences = config.identity_differences(BASE, changed(BASE, name, value))
    if name in FREE or name == "train.steps":
        assert differences == []
    else:
        assert differences == [f"{name}: {before} -> {value!r}"]


def test_a_part_that_was_absent_differs_by_itself_and_every_field():
    now = changed(BASE, "model.decoder", config.Decoder(depth=3))
    found = dict(line.split(": ", 1) for line in config.identity_differences(BASE, now))
    assert found["model.decoder"] == "None -> 'absent'"
    assert found["model.decoder.depth"] == "'absent' -> 3"
    assert len(found) == 1 + len(dataclasses.fields(config.Decoder))


def test_another_kind_differs_by_every_field_that_only_one_has():
    now = changed(BASE, "optim.schedule", config.Constant(warmup=2000))
    assert config.identity_differences(BASE, now) == [
        "optim.schedule.kind: 'cosine' -> 'constant'",
        "optim.schedule.final: 0.0 -> 'absent'",
        "optim.schedule.cooldown: 'absent' -> 0",
    ]
    two = dataclasses.replace(BASE, objective=(config.Softmax(), config.Softmax(weight=0.5)))
    assert config.identity_differences(BASE, two) == [
        "objective.1.kind: 'absent' -> 'softmax'",
        "objective.1.weight: 'absent' -> 0.5",
        "objective.1.sides: 'absent' -> 'image-text'",
        "objective.1.images: 'absent' -> None",
        "objective.1.texts: 'absent' -> None",
        "objective.1.head: 'absent' -> None",
        "objective.1.temperature: 'absent' -> None",
        "objective.1.image_weight: 'absent' -> 0.5",
        "objective.1.label_smoothing: 'absent' -> 0.0",
        "objective.1.reduction: 'absent' -> 'mean'",
        "objective.1.dtype: 'absent' -> 'float32'",
        "objective.1.negatives: 'absent' -> 'others'",
        "objective.1.prefixes: 'absent' -> None",
    ]


def test_the_best_of_two_datasets_is_chosen_by_its_name():
    evals = (config.Zeroshot(), config.Zeroshot(data="tfds:cifar10"), config.Retrieval(), config.Zeroshot(data="tsv:a/b.tsv"))
    for name in (
        "zeroshot_classification/emoji/test/acc1",
        "zeroshot_classification/tfds:cifar10/test/acc5",
        "zeroshot_classification/tsv:a/b.tsv/mean_per_class_recall",
        "zeroshot_retrieval/image_retrieval_recall@10",
        "zeroshot_retrieval/emoji/test/image_retrieval_recall@10",
    ):
        assert best(name, *evals)().train.best == name


def test_evaluations_are_free():
    assert config.identity_differences(BASE, dataclasses.replace(BASE, evals=(config.Retrieval(), config.Zeroshot()))) == []
    one, other = (dataclasses.replace(BASE, evals=(config.Retrieval(every=n),)) for n in (5, 7))
    assert config.identity_differences(one, other) == []


def test_lines_name_every_leaf():
    found = config.lines(RUNS["evaluations"])
    assert "evals.1.every = 7" in found
    assert "optim.rules.0.pattern = '.*/kernel|text/tokens'" in found
    assert "model.image.mean = (0.48145466, 0.4578275, 0.40821073)" in found
    assert len(found) == len({line.partition(" = ")[0] for line in found})


def millions(cfg: Model) -> dict[str, float]:
    tree = jax.eval_shape(lambda: clip.init(cfg, 0))
    count = {name: sum(math.prod(x.shape) for x in jax.tree.leaves(part)) / 1e6 for name, part in tree.items()}
    return {"image": count["image"], "text": count["text"], "all": sum(count.values())}


# Widths, depths, MLPs and heads: table 2 of 2106.04560 (Ti, S, M: DeiT and its kin), So400m: 2305.13035.
PUBLISHED = {
    "CLIP B/32": (  # open_clip/model_profile.csv: 151.28 M, of which 87.85 M see
        Model(image=ImageTower.clip("B/32"), text=TextTower.clip("B")),
        dict(image=87.85, text=63.43, all=151.28),
    ),
    "CLIP B/16": (Model(image=ImageTower.clip("B/16"), text=TextTower.clip("B")), dict(image=86.19, text=63.43, all=149.62)),
    "CLIP L/14": (Model(image=ImageTower.clip("L/14"), text=TextTower.clip("L")), dict(image=303.97, text=123.65, all=427.62)),
    "CLIP H/14": (Model(image=ImageTower.clip("H/14"), text=TextTower.clip("H")), dict(image=632.08, text=354.03, all=986.11)),
    "CLIP g/14": (  # 1366.68 M with 1012.65 that see
        Model(image=ImageTower.clip("g/14"), text=TextTower.clip("g")),
        dict(image=1012.65, text=354.03, all=1366.68),
    ),
    "CLIP bigG/14": (
        Model(image=ImageTower.clip("G/14"), text=TextTower.clip("G")),
        dict(image=1844.91, text=694.66, all=2539.57),
    ),
    "SigLIP B/16": (  # vit_base_patch16_siglip_224: 203.16 M, of which 92.88 M see (open_clip: ViT-B-16-SigLIP)
        Model(image=ImageTower.siglip("B/16"), text=TextTower.siglip("B"), init_bias=-10.0),
        dict(image=92.88, text=110.27, all=203.16),
    ),
    "SigLIP L/16 256": (
        Model(image=ImageTower.siglip("L/16", image_size=256), text=TextTower.siglip("L"), init_bias=-10.0),
        dict(image=315.96, text=336.19, all=652.15),
    ),
    "SigLIP So400m/14": (  # ViT-SO400M-14-SigLIP: 877.36 M, 427.68 M of them see
        Model(image=ImageTower.siglip("So400m/14"), text=TextTower.siglip("So400m", length=16), init_bias=-10.0),
        dict(image=427.68, text=449.68, all=877.36),
    ),
}


@pytest.mark.parametrize(("model", "published"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_models_have_their_number_of_parameters(model, published):
    assert millions(model) == pytest.approx(published, abs=0.006)


# The encoders' own sizes without any head, in millions: ViT's table 1 (2010.11929) and 2106.04560's table 2, to their digits.
BARE = {"Ti/16": 5.5, "S/16": 21.7, "M/16": 38.5, "B/16": 85.8, "L/16": 303.3, "So400m/14": 412, "g/14": 1011, "G/14": 1843}


@pytest.mark.parametrize(("name", "published"), BARE.items(), ids=BARE.keys())
def test_named_sizes(name, published):
    letter, patch = name.split("/")
    image = ImageTower.siglip(name, pool="mean")
    text = TextTower.siglip(letter)
    count = millions(Model(image=image, text=text))["image"]
    assert count == pytest.approx(published, rel=0.01)
    assert image.patch_size == int(patch)
    assert (text.width, text.depth, text.mlp_dim, text.heads) == config.SIZES[letter]
    assert config.size(letter) == dict(width=image.width, depth=image.depth, mlp_dim=image.mlp_dim, heads=image.heads)


def test_families():
    clip_image, siglip_image = ImageTower.clip("L/14", image_size=336), ImageTower.siglip("L/16")
    assert (clip_image.pool, clip_image.pre_norm, clip_image.patch_bias, clip_image.norm_eps) == ("cls", True, False, 1e-5)
    assert (siglip_image.pool, siglip_image.pre_norm, siglip_image.patch_bias, siglip_image.norm_eps) == (
        "map",
        False,
        True,
        1e-6,
    )
    assert (clip_image.embed_dim, clip_image.image_size, clip_image.patches) == (768, 336, 576)
    assert (siglip_image.embed_dim, siglip_image.mean) == (None, (0.5, 0.5, 0.5))
    clip_text, siglip_text = TextTower.clip("L"), TextTower.siglip("L")
    assert (clip_text.causal, clip_text.pool, clip_text.length, clip_text.width) == (True, "eot", 77, 768)
    assert (siglip_text.causal, siglip_text.pool, siglip_text.length, siglip_text.width) == (False, "last", 64, 1024)
    assert (clip_text.projection_bias, siglip_text.projection_bias, siglip_text.vocab_size) == (False, True, 32000)
    for letter in config.SIZES:  # every name makes a pair of towers that fit, in both families
        Model(image=ImageTower.clip(f"{letter}/14"), text=TextTower.clip(letter))
        Model(image=ImageTower.siglip(f"{letter}/14"), text=TextTower.siglip(letter), init_bias=-10.0)
