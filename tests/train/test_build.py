"""What building a run leaves in its workdir, and when."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from clipjax import build, cli, config, restore
from clipjax.config import ConfigError, Preserve
from clipjax.data.sources import open_source
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.training import make_evaluators
from clipjax.train import workdir
from clipjax.train.origin import Origin
from tests.train import tiny, tiny_hosts


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two datasets of 16 images with different words."""
    folder, found = tmp_path_factory.mktemp("data"), {}
    for words in ("red green blue yellow", "uno due tre quattro"):
        rows = ["filepath\ttitle"]
        for i in range(16):
            Image.new("RGB", (16, 16), (i, 2 * i, 3 * i)).save(folder / f"{i}.png")
            rows.append(f"{i}.png\t{' '.join(words.split()[: i % 4 + 1])} {words}")
        path = folder / f"{words[:3]}.tsv"
        path.write_text("\n".join(rows) + "\n")
        found[words[:3]] = open_source(config.Data(spec=f"tsv:{path}"))
    return found


@pytest.fixture
def run(sources):
    cfg = tiny.run(
        train=config.Train(steps=2, batch_size=16, log_every=1), optim=config.Optim(schedule=config.Constant(warmup=1))
    )
    return dataclasses.replace(cfg, data=config.Data(spec=sources["red"].name, workers=1))


class Untouched:
    """A source that must not be read."""

    name, captioned = "untouched", True

    def __len__(self):
        return 16

    def captions(self, texts=None):
        raise AssertionError("its captions were read")


def vocabulary(path):
    return Tokenizer.load(path, 8).backend.get_vocab()


def test_a_tokenizer_without_checkpoint_is_made_anew(run, sources, tmp_path):
    build.tokenizer(run, tiny.opened(run, tmp_path), sources["red"])
    before = vocabulary(tmp_path / "tokenizer.json")
    made = build.tokenizer(run, tiny.opened(run, tmp_path), sources["uno"])  # the first was stopped before it had a checkpoint
    assert made.backend.get_vocab() == vocabulary(tmp_path / "tokenizer.json") != before
    for lowercase in (True, False):
        cased = dataclasses.replace(run, tokenizer=config.BPE(lowercase=lowercase))
        upper, lower = build.tokenizer(cased, tiny.opened(cased, tmp_path), sources["red"]).encode(["RED", "red"])[0]
        assert (upper == lower).all() == lowercase


def test_cleaning_is_of_the_configuration(run, sources, tmp_path):
    """The first process trains and saves the tokenizer, the others and a run that resumes load it: all clean alike."""
    cleaned = dataclasses.replace(run, tokenizer=config.BPE(clean="canonicalize"))
    made = build.tokenizer(cleaned, tiny.opened(cleaned, tmp_path), sources["red"])
    file = config.TokenizerFile(path=str(tmp_path / "tokenizer.json"), clean="canonicalize")
    other = dataclasses.replace(run, tokenizer=file)
    loaded = build.tokenizer(other, tiny.opened(other, tmp_path / "other"), sources["red"])
    new = workdir.Workdir(tmp_path / "new", origin=Origin(tmp_path, 3, cleaned))
    taken = build.tokenizer(cleaned, new, sources["red"])
    for tokens in (made, loaded, taken):
        one, same = tokens.encode(["Red, &quot;green&quot;...", "red green"])[0].tolist()
        assert one == same


def test_the_tokenizer_comes_along_with_a_state(run, sources, tmp_path):
    """Also to other captions."""
    build.tokenizer(run, tiny.opened(run, tmp_path / "old"), sources["uno"])
    new = workdir.Workdir(tmp_path / "new", origin=Origin(tmp_path / "old", 3, run))
    made = build.tokenizer(run, new, sources["red"]).backend.get_vocab()
    assert made == vocabulary(tmp_path / "old" / "tokenizer.json") == vocabulary(tmp_path / "new" / "tokenizer.json")
    (tmp_path / "old" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"^init\.run = '.*old@3': its workdir has no tokenizer\.json"):
        build.tokenizer(run, new, sources["red"])


def test_a_checkpoints_tokenizer_stays(run, sources, tmp_path):
    tokens = build.tokenizer(run, tiny.opened(run, tmp_path), sources["red"])
    tiny.train_in(tmp_path, run, build.batches(run, sources["red"], tokens), [], tiny.mesh_of())
    written = (tmp_path / "tokenizer.json").read_bytes()
    again = build.tokenizer(run, tiny.opened(run, tmp_path), Untouched())
    assert again.backend.get_vocab() == tokens.backend.get_vocab()
    for other, message in (
        (dataclasses.replace(run, tokenizer=config.BPE(lowercase=False)), "tokenizer.lowercase: True -> False"),
        (dataclasses.replace(run, tokenizer=config.BPE(clean="web")), "tokenizer.clean: 'none' -> 'web'"),
        (dataclasses.replace(run, data=dataclasses.replace(run.data, resize="crop")), "data.resize: 'squash' -> 'crop'"),
    ):
        with pytest.raises(ConfigError, match=f"(?s)another run.*{message}"):
            tiny.opened(other, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == written
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"^--workdir = .*: has checkpoints but no tokenizer\.json"):
        build.tokenizer(run, tiny.opened(run, tmp_path), Untouched())


def test_a_dataset_smaller_than_a_batch_leaves_no_workdir(run, tmp_path):
    big = dataclasses.replace(run, train=dataclasses.replace(run.train, batch_size=17))
    with pytest.raises(ConfigError, match=r"^train\.batch_size = 17: is more than the 16 examples of untouched: use at most 16$"):
        build.tokenizer(big, tiny.opened(big, tmp_path / "run"), Untouched())
    assert not (tmp_path / "run").exists()


def test_data_that_does_not_fit_leaves_no_workdir(run, sources, tmp_path):
    several = dataclasses.replace(run, data=dataclasses.replace(run.data, captions_per_image=2))
    with pytest.raises(ConfigError, match=r"^data\.captions_per_image = 2: no example of tsv:.* has more than 1 captions "):
        build.tokenizer(several, tiny.opened(several, tmp_path / "run"), sources["red"])
    taught = dataclasses.replace(run, data=dataclasses.replace(run.data, teacher=str(tmp_path / "no.npz")))
    with pytest.raises(ConfigError, match=r"^data\.teacher = '.*no\.npz': there is no such file"):
        build.teacher(taught, sources["red"])
    assert list(tmp_path.iterdir()) == []


def test_the_teacher_is_opened_once(run, sources, tmp_path):
    rows = np.arange(16, dtype=np.float32)[:, None]
    np.savez(tmp_path / "teacher.npz", image=rows, text=-rows, key=[f"{i}.png" for i in range(16)])
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, teacher=str(tmp_path / "teacher.npz")))
    teacher = build.teacher(run, sources["red"])
    tokens = build.tokenizer(run, tiny.opened(run, tmp_path / "run"), sources["red"])
    (tmp_path / "teacher.npz").unlink()  # mapped, so that a second look alone would miss it
    with build.batches(run, sources["red"], tokens, teacher=teacher)(0) as opened:
        batch = next(opened)
    np.testing.assert_array_equal(batch["teacher_image"][:, 0], batch["index"])
    np.testing.assert_array_equal(batch["teacher_text"][:, 0], -batch["index"])
    assert build.teacher(dataclasses.replace(run, data=dataclasses.replace(run.data, teacher=None)), sources["red"]) is None


def test_what_is_preserved_must_have_the_model_s_width(run, sources, tmp_path):
    rows = np.ones((16, 3), np.float32)
    np.savez(tmp_path / "start.npz", image=rows, text=rows, key=[f"{i}.png" for i in range(16)])
    data = dataclasses.replace(run.data, teacher=str(tmp_path / "start.npz"))
    run = dataclasses.replace(run, data=data, objective=(*run.objective, Preserve()))
    with pytest.raises(ConfigError, match=rf"^data\.teacher = 3: its vectors must have the width .* {run.model.embed_dim}: "):
        build.teacher(run, sources["red"])
    assert build.teacher(dataclasses.replace(run, objective=run.objective[:-1]), sources["red"]).width == 3


def test_evaluations_are_named_in_the_configuration_as_in_the_results(run, sources):
    """What train.best may name is what the loop keys results by."""
    wanted = [
        config.Retrieval(data=d, split=s) for d, s in ((sources["red"].name, "test"), ("emoji", "test"), ("emoji", "train"))
    ]
    evals = (*wanted, config.Zeroshot())
    words = Tokenizer.train(["a"], 400, True, 8)
    for evaluator in make_evaluators(dataclasses.replace(run, evals=tuple(wanted)), tiny.mesh_of(), words):
        best = f"{evaluator.task}/{evaluator.dataset}/{config.Retrieval.metrics[0]}"
        assert config.Run(data=config.Data(spec="emoji"), train=config.Train(best=best), evals=evals).train.best == best


def test_what_a_run_starts_from_is_looked_up_once(sources, tmp_path, monkeypatch):
    """From the command line to the first step: one search for checkpoints, and one read of the newest one's configuration."""
    calls = []

    def counted(owner, name):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (calls.append(name), function(*args))[1])

    counted(workdir, "newest")
    counted(restore, "read_config")
    command = ["train", tiny_hosts.__file__, "--workdir", str(tmp_path / "run"), "--data.spec", sources["red"].name]
    for expected in (["newest"], ["newest", "read_config"]):  # a new run; then it resumes, and is finished
        calls.clear()
        assert cli.main([*command, "--train.steps", "3"]) == 0
        assert calls == expected
