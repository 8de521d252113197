"""Workdirs on gs:// and s3://: the real command line and real servers of both kinds (see stores.py)."""

import dataclasses
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
import tensorstore
from botocore.exceptions import EndpointConnectionError

import clipjax
from clipjax import checkpoint, cli, config, files, preemption, restore, s3, swap
from clipjax.config.start import split_name
from clipjax.data.tokenizer import Tokenizer
from clipjax.metrics.writer import MetricsWriter
from clipjax.models import clip
from clipjax.train import owner
from clipjax.train.optimizer import make_optimizer
from clipjax.train.origin import restore_origin
from clipjax.train.state import abstract_state, initial_state
from tests import guard, stores
from tests.conftest import CACHE, QUICK, SIMPLEST
from tests.train import tiny, tiny_emoji

ROOT = Path(__file__).parents[1]
STORES = ("gs", "s3")


@pytest.fixture(scope="module", params=STORES)
def store(request):
    """An empty store of this process, with a bucket; its scheme."""
    with stores.of_this_process(request.param):
        s3._account.cache_clear()
        yield request.param


@pytest.fixture
def watched():
    unwatch = guard.watch()
    yield
    unwatch()


def test_a_path_is_local_or_knows_its_store():
    assert files.as_path("runs/a") == Path("runs/a")
    assert isinstance(files.as_path("/runs/a"), Path)
    for name in ("gs://bucket/runs/a", "s3://bucket/runs/a"):
        path = files.as_path(name)
        assert str(path) == str(files.resolve(path)) == str(files.as_path(path)) == name
        assert str(path / "config.json") == f"{name}/config.json"
        assert files.scheme(path) == name[:2]
    assert files.scheme("a:b/c") is None
    with pytest.raises(config.ConfigError, match=r"az://box/a: is neither local nor on gs:// or s3://"):
        files.as_path("az://box/a")


def test_the_guard_guards(watched):
    exec(compile("import pathlib\npathlib.Path('runs')", guard.CLIPJAX + "/x.py", "exec"), {})
    with pytest.raises(AssertionError, match="pathlib is given"):
        exec(compile("import pathlib\npathlib.Path('s3://bucket/run')", guard.CLIPJAX + "/x.py", "exec"), {})


@pytest.mark.parametrize(("name", "module", "extra"), [("gs://bucket/run", "gcsfs", "gcs"), ("s3://bucket/run", "s3fs", "s3")])
def test_a_missing_extra_is_named_before_anything_is_done(monkeypatch, capsys, tmp_path, name, module, extra):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == module else find(wanted))
    monkeypatch.chdir(tmp_path)
    said = f"{name}: {name[:2]}:// needs {module}, which is not installed: pip install 'clipjax[{extra}]'"
    with pytest.raises(SystemExit) as exit:
        cli.main(["train", tiny_emoji.__file__, "--workdir", name])
    assert exit.value.code == 2
    assert said in capsys.readouterr().err
    assert cli.main(["eval", "retrieval", name, "--data", "emoji"]) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(config.ConfigError, match="pip install"):
        clipjax.load(name)
    assert list(tmp_path.iterdir()) == []


def test_an_export_needs_a_local_folder(capsys):
    with pytest.raises(SystemExit):
        cli.main(["export", "run", "--to", "open_clip", "--out", "s3://bucket/out"])
    assert "s3://bucket/out is remote: name a folder of this machine" in capsys.readouterr().err


@pytest.mark.parametrize(("url", "more"), [("https://s3.eu-west-1.amazonaws.com", set()), ("http://localhost:1", {"endpoint"})])
def test_orbax_is_patched_for_s3(monkeypatch, url, more):
    """The layout is that of gs://, array by array, the driver TensorStore's own for S3, and a local folder is what it was."""
    from orbax.checkpoint._src.serialization import tensorstore_utils as orbax

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    s3._account.cache_clear()
    local = orbax.build_kvstore_tspec("/runs/a/params", "kernel")
    s3.patch_orbax()
    assert orbax.build_kvstore_tspec("/runs/a/params", "kernel") == local
    google = orbax.build_kvstore_tspec("gs://bucket/runs/a/params", "kernel")
    found = orbax.build_kvstore_tspec("s3://bucket/runs/a/params", "kernel")
    assert google["base"]["driver"] == "gcs"
    assert found | {"base": None} == google | {"base": None}
    base = found["base"]
    assert {k: base[k] for k in ("driver", "bucket", "path")} == dict(driver="s3", bucket="bucket", path="runs/a/params")
    assert base.keys() - {"driver", "bucket", "path", "aws_credentials", "aws_region"} == more
    assert tensorstore.KvStore.Spec(base).to_json()["driver"] == "s3"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    s3._account.cache_clear()


def test_files_of_a_store(store, watched):
    folder = files.as_path(f"{store}://{stores.BUCKET}/files")
    files.check_writable(folder)
    assert not folder.exists()  # nothing stays behind
    for text in ("one", "two"):
        with files.write_atomic(folder / "new" / "a.txt") as part:
            assert isinstance(part, Path)
            part.write_text(text)
        assert (folder / "new" / "a.txt").read_text() == text

    def interrupted():
        with files.write_atomic(folder / "new" / "a.txt") as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (folder / "new" / "a.txt").read_text() == "two"
    assert [p.name for p in (folder / "new").iterdir()] == ["a.txt"]

    made = Tokenizer.train(["a cat", "a dog"], 300, True, 8)
    made.save(folder / "tokenizer.json")
    assert Tokenizer.load(folder / "tokenizer.json", 8).vocab_size == made.vocab_size
    with pytest.raises(config.ConfigError, match=f"RUN = '{store}://{stores.BUCKET}/files': is not a workdir"):
        split_name(f"{store}://{stores.BUCKET}/files")


def test_only_the_version_that_was_read_is_replaced(store, watched):
    path = files.as_path(f"{store}://{stores.BUCKET}/swap/file.json")
    assert swap.read(path) is None
    one = swap.swap(path, None, b"one")
    assert swap.read(path) == one
    assert swap.swap(path, None, b"late") is None
    assert swap.is_exclusive(path, one)
    two = swap.swap(path, one, b"two")
    assert swap.read(path) == two
    assert two.content == b"two"
    assert swap.swap(path, one, b"late") is None
    assert swap.read(path) == two
    assert swap.swap(path, one, b"two") == two  # its own write, for which a library got no answer and asked again
    swap.remove(path)
    swap.remove(path)
    assert swap.swap(path, two, b"late") is None
    assert swap.read(path) is None


@pytest.mark.parametrize("store", ["s3"], indirect=True)
@pytest.mark.parametrize("status", [200, 501], ids=["ignored", "refused"])
def test_an_s3_store_without_conditions_is_told(store, monkeypatch, capsys, status):
    """Older ones of other makers take the condition and do not heed it, or answer that it is not implemented."""
    from botocore.exceptions import ClientError

    fs = fsspec.filesystem("s3")
    call = fs.call_s3

    def without(method, **keywords):
        wanted = {name: keywords.pop(name) for name in ("IfMatch", "IfNoneMatch") if name in keywords}
        if wanted and status == 501:
            answer = {"Error": {"Code": "NotImplemented"}, "ResponseMetadata": {"HTTPStatusCode": 501}}
            raise OSError("not implemented") from ClientError(answer, "PutObject")
        return call(method, **keywords)

    monkeypatch.setattr(fs, "call_s3", without)
    workdir = files.as_path(f"s3://{stores.BUCKET}/unconditional-{status}")
    held = owner.claim(workdir)
    assert f"{workdir}: its store has no conditional writes" in capsys.readouterr().err
    held._try_to_renew()
    held.check(look=True)
    with pytest.raises(preemption.OwnedError):
        owner.claim(workdir)
    held.release()
    assert swap.read(workdir / "owner.json") is None


def test_a_workdir_on_a_store_has_one_owner(store, watched, monkeypatch, capsys):
    workdir = files.as_path(f"{store}://{stores.BUCKET}/owned")
    now = [0.0]
    monkeypatch.setattr(owner, "clock", lambda: now[0])
    monkeypatch.setattr(owner, "time", types.SimpleNamespace(sleep=lambda seconds: now.append(now.pop() + seconds)))
    held = owner.claim(workdir)
    assert capsys.readouterr().err == ""
    before = swap.read(workdir / "owner.json")
    with pytest.raises(preemption.OwnedError, match=str(os.getpid())):
        owner.claim(workdir)
    held._try_to_renew()
    assert swap.read(workdir / "owner.json") not in (None, before)
    held.release()
    assert swap.read(workdir / "owner.json") is None

    elsewhere = dataclasses.replace(owner.new_record(), host="elsewhere")
    swap.swap(workdir / "owner.json", None, elsewhere.content())
    held = owner.claim(workdir)
    assert 90 <= now[0] <= 92
    assert "taken over from process" in capsys.readouterr().err

    (workdir / "owner.json").write_bytes(elsewhere.content())
    now[0] += 61
    writer = MetricsWriter(workdir, 0, check_owner=held.check)
    with pytest.raises(owner.LostError, match="elsewhere"):
        writer.flush()
    with pytest.raises(owner.LostError):
        writer.close()
    held.release()
    assert owner.parse((workdir / "owner.json").read_bytes()) == elsewhere
    assert [p.name for p in workdir.iterdir()] == ["owner.json"]


def lines(workdir):
    """In one request: a file that is replaced between two can't be read as a stream."""
    path = str(workdir / "metrics.jsonl")
    return [json.loads(line) for line in fsspec.filesystem(files.scheme(path) or "file").cat_file(path).splitlines()]


def test_metrics_of_a_store(store, watched):
    """Complete at each flush and evaluation, in the background in between; past the restored step, removed."""
    workdir = files.as_path(f"{store}://{stores.BUCKET}/metrics")
    writer = MetricsWriter(workdir)
    for step in (1, 2, 3):
        writer.push(step, {"loss": np.float32(step)}, {})
    assert not (workdir / "metrics.jsonl").exists()
    writer.flush()
    assert lines(workdir) == [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    writer.evaluation(3, "zeroshot", {"acc1": 0.5}, dataset="emoji")
    assert lines(workdir)[-1]["metrics"] == {"acc1": 0.5}
    writer._mirror.EVERY = 0  # time has passed
    for step in (4, 5):
        writer.push(step, {"loss": np.float32(step)}, {})
    for _ in range(100):
        if lines(workdir)[-1]["step"] == 4:  # 5 is read when 6 is
            break
        time.sleep(0.1)
    assert [line["step"] for line in lines(workdir)] == [1, 2, 3, 3, 4]

    resumed = MetricsWriter(workdir, 2)  # as if the process had died
    resumed.push(3, {"loss": np.float32(30)}, {})
    resumed.flush()
    resumed.evaluation(3, "zeroshot", {"acc1": 0.5}, dataset="emoji")
    resumed.close()
    events = [p.read_bytes() for p in (workdir / "tensorboard").iterdir()]
    assert sum(b"zeroshot/emoji/acc1" in content for content in events) >= 1
    assert [line for line in lines(workdir) if "loss" in line] == [dict(step=s, loss=x) for s, x in ((1, 1), (2, 2), (3, 30))]
    writer._file.close()
    for board in writer._boards:
        board.close()
    writer._mirror._folder.cleanup()


def test_a_missing_bucket_is_reported(store, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        cli.main(["train", tiny_emoji.__file__, "--workdir", f"{store}://no-such-bucket/run"])
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert f"argument --workdir: {store}://no-such-bucket/run: can't be reached" in said
    assert "does the bucket exist" in said
    assert list(tmp_path.iterdir()) == []


def test_a_silent_store_is_reported_in_time(monkeypatch, capsys):
    """A server that takes connections and answers none: libraries would wait for minutes."""
    monkeypatch.setattr(files, "TIMEOUT", 2)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        assert cli.main(["train", tiny_emoji.__file__, "--workdir", "s3://bucket/run"]) == 1  # launchers try again
        assert time.monotonic() - start < 15
    assert "s3://bucket/run: can't be reached (no answer within 2 s)" in capsys.readouterr().err
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FileNotFoundError("bucket"), config.ConfigError),
        (PermissionError("Access Denied"), config.ConfigError),
        (OSError("Forbidden: bucket/run"), config.ConfigError),
        (ValueError("Bad Request"), config.ConfigError),
        (ConnectionRefusedError("refused"), OSError),
        (OSError(16, "Please reduce your request rate"), OSError),
        (EndpointConnectionError(endpoint_url="https://a"), OSError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_a_refusal_is_wrong_use_and_a_store_without_a_way_to_it_may_come_back(error, kind):
    def ask():
        raise error

    with pytest.raises(kind, match=r"gs://bucket/run: can't be reached \(") as caught:
        files.reach(files.as_path("gs://bucket/run"), ask)
    assert isinstance(caught.value, config.ConfigError) == (kind is config.ConfigError)


@pytest.mark.slow
def test_checkpoints_of_a_store(store, watched):
    """What is saved comes back; a save that was cut off is none, and is cleared away."""
    workdir = files.as_path(f"{store}://{stores.BUCKET}/checkpoints-alone")
    cfg = tiny.run()
    mesh = tiny.mesh_of(2, 2)
    state, _, _ = tiny.train(cfg, mesh, 1)
    with checkpoint.Checkpoints(workdir, cfg) as made:
        made.save(1, state)
    (workdir / "checkpoints" / "7" / "params" / "_METADATA").write_text("{}")
    assert restore.newest(workdir) == (1, cfg)
    with checkpoint.Checkpoints(workdir, cfg) as made:
        made.wait()
        assert made.latest() == 1
        restored = made.restore(1, abstract(cfg, mesh))
    assert not (workdir / "checkpoints" / "7").exists()
    for a, b in zip(*map(jax.tree.leaves, (state, restored)), strict=True):
        np.testing.assert_array_equal(a, b)


def abstract(cfg, mesh):
    """A state's shapes with their shardings."""
    tx = make_optimizer(cfg.optim, cfg.train.steps, jax.eval_shape(lambda: clip.init(cfg.model, cfg.seed)))
    return abstract_state(cfg, tx, mesh)


def start(*arguments, cwd=None):
    """`clipjax ARGUMENTS` by the real command line, under the guard."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(CACHE), "TOKENIZERS_PARALLELISM": "false"}
    env |= {"XLA_FLAGS": SIMPLEST} if QUICK else {}
    command = [sys.executable, str(ROOT / "tests" / "guard.py"), *map(str, arguments)]
    return subprocess.Popen(command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*arguments, cwd=None):
    process = start(*arguments, cwd=cwd)
    said, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    return said, errors


TRAIN = ("train", tiny_emoji.__file__, "--train.steps", "40", "--train.checkpoint_every", "10", "--evals.0.every", "20")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that never left this machine nor was interrupted."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    finish(*TRAIN, "--workdir", workdir)
    return workdir


def kill_after(workdir, step, cwd):
    """SIGKILL once a checkpoint is finished and a later step has been taken."""
    process = start(*TRAIN, "--workdir", workdir, cwd=cwd)
    deadline = time.monotonic() + 400
    commit = workdir / "checkpoints" / str(step) / "commit_success.txt"
    while not commit.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_on_a_store(store, straight, tmp_path):
    """Killed and resumed it is bit-equal to a local one; evaluated, embedded, exported and loaded it gives the same."""
    name = f"{store}://{stores.BUCKET}/runs/one"
    workdir, folder = files.as_path(name), tmp_path / "folder"
    folder.mkdir()
    kill_after(workdir, 10, folder)
    _, errors = finish(*TRAIN, "--workdir", name, cwd=folder)
    assert f"{name}: resuming at step " in errors
    assert list(folder.iterdir()) == []  # no folder s3: or gs:
    names = {p.name for p in workdir.iterdir()}
    assert (
        names
        == {p.name for p in straight.iterdir()}
        == {"checkpoints", "config.json", "metrics.jsonl", "tensorboard", "tokenizer.json"}
    )
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [30, 40]  # keep = 2
    for file in ("config.json", "tokenizer.json"):
        assert (workdir / file).read_text() == (straight / file).read_text()
    for kind in ("loss", "metrics"):
        ours, local = ([(x["step"], x[kind]) for x in lines(run) if kind in x] for run in (workdir, straight))
        assert ours == local
    assert len(list((workdir / "tensorboard").iterdir())) == 2  # of two starts

    for run, out in ((name, f"{name}/retrieval.json"), (straight, tmp_path / "retrieval.json")):
        said, _ = finish("eval", "retrieval", f"{run}@30", "--data", "emoji", "--json", out, cwd=folder)
        assert json.loads(said) == json.loads(files.as_path(out).read_text())
    ours, local = (json.loads(files.as_path(x).read_text()) for x in (f"{name}/retrieval.json", tmp_path / "retrieval.json"))
    assert (ours["model"], ours["pretrained"]) == ("one", "step 30")
    assert ours["metrics"] == local["metrics"]
    finish("embed", name, "--data", "emoji", "--out", f"{name}/test.npz", cwd=folder)
    with (workdir / "test.npz").open("rb") as file:
        embedded = dict(np.load(file))
    finish("export", name, "--to", "open_clip", "--out", folder / "export", cwd=folder)
    assert {p.name for p in folder.iterdir()} == {"export"}
    model = clipjax.load(name)
    assert (model.name, model.step) == ("one", 40)
    texts = ["grinning face", "astronaut"]
    np.testing.assert_array_equal(model.encode_text(texts), clipjax.load(straight).encode_text(texts))
    assert embedded["image"].shape == embedded["text"].shape == (363, 32)


def test_a_state_of_a_store_is_started_from(store, watched, tmp_path):
    """And one that is not there is refused by its name."""
    cfg = tiny.run(train=config.Train(steps=9, batch_size=16), optim=config.Optim(schedule=config.Constant(warmup=1)))
    tx = make_optimizer(cfg.optim, 9, jax.eval_shape(lambda: clip.init(cfg.model, cfg.seed)))
    name, state = f"{store}://{stores.BUCKET}/origin", initial_state(cfg, tx, tiny.mesh_of())
    workdir = files.as_path(name)
    with checkpoint.Checkpoints(workdir, cfg) as made:
        made.save(3, state)
    (workdir / "config.json").write_text(config.to_json(cfg))
    run = dataclasses.replace(cfg, init=config.Init(run=f"{name}@3", state="all"))
    origin = tiny.opened(run, tmp_path / "new").origin
    assert (str(origin), origin.run) == (f"{name}@3", cfg)
    restored = restore_origin(run, origin, abstract_state(run, tx, tiny.mesh_of()))
    assert jax.tree.all(jax.tree.map(np.array_equal, restored, state))
    for wrong, message in (("@4", "has checkpoints of steps 3 only"), ("/none", "is not a workdir")):
        run = dataclasses.replace(cfg, init=config.Init(run=name + wrong, state="all"))
        with pytest.raises(config.ConfigError, match=rf"^init\.run = '{name}{wrong}': {message}"):
            tiny.opened(run, tmp_path / "new")
