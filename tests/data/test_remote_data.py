"""Prepared datasets on gs:// and s3://, with real servers of both kinds (see tests/stores.py). They hold six emoji."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import emoji as package
import pytest

from clipjax import cli, config, files
from clipjax.config import ConfigError
from clipjax.data.sets import emoji
from clipjax.data.sources import open_source
from clipjax.data.storage import remote
from clipjax.evals.prompts import classnames
from tests import guard, stores

pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # gcsfs hands whole files to aiohttp
TRAIN, TEST = (config.Data(spec="emoji", split=split) for split in ("train", "test"))


@pytest.fixture(scope="module", params=("gs", "s3"))
def bucket(request):
    """An empty bucket of this process, as a URL."""
    with stores.of_this_process(request.param):
        unwatch = guard.watch()
        yield f"{request.param}://{stores.BUCKET}"
        unwatch()


@pytest.fixture(scope="module")
def few():
    """Only six emoji in the world: two of them of split `test`."""
    tests = [s for s, data in package.EMOJI_DATA.items() if emoji.is_test(s) and data["status"] == 2 and data["E"] < 12]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "EMOJI_DATA", {s: package.EMOJI_DATA[s] for s in ("🚀", "😀", "👍", "🍎", *tests[:2])})
        yield


@pytest.fixture
def place(bucket, few, tmp_path, monkeypatch):
    """A folder of the bucket that is TFDS_DATA_DIR; the cache and the working directory are new."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", f"{bucket}/{tmp_path.name}")
    return files.as_path(f"{bucket}/{tmp_path.name}") / "emoji" / emoji.VERSION


def records(data):
    source = open_source(data)
    return [source.record(i) for i in range(len(source))]


def copies(tmp_path):
    return sorted(path.name.split("-")[0] for path in tmp_path.glob("cache/clipjax/tfds/*/bucket/*/emoji/1.0.0/*-*"))


def test_prepare_builds_here_and_uploads(place, tmp_path, capsys, monkeypatch):
    assert cli.main(["data", "prepare", "emoji"]) == 0
    assert capsys.readouterr().out == f"{place}\n"
    assert remote.is_prepared(place)
    assert list(tmp_path.iterdir()) == []  # no folder gs:
    uploaded = records(TEST)
    monkeypatch.setattr(emoji, "upload", None)
    assert cli.main(["data", "prepare", "emoji"]) == 0  # nothing to do
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "here"))
    assert uploaded == records(TEST)


def test_a_split_is_copied_once(place, tmp_path, capsys, monkeypatch):
    assert [record.key for record in records(TRAIN)]  # built, as it is in a local folder
    first = records(TEST)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" to ")[0].rpartition(" in ")[2] for line in said] == ["5 files"] * 2
    assert said[0].startswith(f"{place}: copying 0.")
    assert copies(tmp_path) == ["test", "train"]
    monkeypatch.setattr(remote, "_copy", None)
    assert records(config.Data(spec="tfds:emoji", text_field="caption", split="test[:2]")) == first[:2]
    assert capsys.readouterr().err == ""


def test_what_has_changed_in_the_store_is_copied_again(place, tmp_path, monkeypatch):
    before = records(TRAIN)
    other = {s: package.EMOJI_DATA[s] for s in package.EMOJI_DATA if s != "🚀"}
    monkeypatch.setattr(package, "EMOJI_DATA", other)
    monkeypatch.setattr(emoji, "sources", lambda font: {"font": "of another version", "emoji": "the same"})
    assert cli.main(["data", "prepare", "emoji"]) == 0
    after = records(TRAIN)
    assert [r.key for r in before if r.key != emoji.key_of("🚀")] == [r.key for r in after]
    assert copies(tmp_path) == ["train"]


def test_no_room_and_missing_files_are_named(place, tmp_path, monkeypatch):
    open_source(TRAIN)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(
        ConfigError, match=rf"{place}: 0.1 MB must be copied, and .*: set XDG_CACHE_HOME to a folder with room, or"
    ):
        open_source(TEST)
    files.store(place).rm_file(str(next(iter(place.glob("emoji-test*")))))
    with pytest.raises(ConfigError, match=rf"{place}: lacks emoji-test.array_record-00000-of-00001"):
        open_source(TEST)
    assert copies(tmp_path) == ["incomplete.test", "train"]
    with pytest.raises(ConfigError, match=r"'tfds:other': not among the datasets in .* \(emoji\); prepare it"):
        open_source(config.Data(spec="tfds:other"))


def test_a_copy_that_was_interrupted_goes_on(place, tmp_path, capsys, monkeypatch):
    open_source(TRAIN)
    (whole,) = tmp_path.glob("cache/clipjax/tfds/*/bucket/*/emoji/1.0.0/train-*")
    shard = whole / "emoji-train.array_record-00000-of-00001"
    shard.write_bytes(shard.read_bytes()[:100])
    whole.rename(whole.with_name(f"incomplete.{whole.name}"))
    capsys.readouterr()
    monkeypatch.setattr(remote, "GROUP", 1)
    monkeypatch.setattr(remote, "SAY_EVERY", 0.0)
    assert len(records(TRAIN)) == 4
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1].split(" to ")[0] for line in said] == ["copying 0.1 MB in 1 files", "copied 0.1 MB of 0.1 MB"]
    monkeypatch.setattr(remote, "_get", lambda *_: (_ for _ in ()).throw(OSError("the store is gone")))
    assert records(TRAIN)
    with pytest.raises(OSError, match="the store is gone"):
        open_source(TEST)
    assert copies(tmp_path) == ["incomplete.test", "train"]


def test_processes_of_a_machine_make_one_copy(place, tmp_path, capsys):
    open_source(TEST)
    shutil.rmtree(tmp_path / "cache")
    capsys.readouterr()
    with ThreadPoolExecutor(3) as pool:  # the lock is one of open files, and holds among threads as among processes
        assert {len(source) for source in pool.map(open_source, [TEST] * 3)} == {2}
    assert capsys.readouterr().err.count("copying") == 1


def test_prompts_and_tokenizers_of_a_store(place, tmp_path, capsys):
    with files.write_atomic(place / "names.txt") as part:
        part.write_text("a cat\na dog\n")
    assert classnames(str(place / "names.txt")) == ("a cat", "a dog")
    with pytest.raises(ConfigError, match=rf"classnames = '{place}/none.txt': .*use a file with one class name a line"):
        classnames(str(place / "none.txt"))
    with pytest.raises(SystemExit):
        cli.main(["import", "--from", "open_clip", str(place), "--out", str(tmp_path)])
    assert f"argument SRC: {place} is remote: copy it to this machine, and name that" in capsys.readouterr().err


def test_a_folder_of_no_store_is_named(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "az://box/data")
    with pytest.raises(ConfigError, match=r"TFDS_DATA_DIR = az://box/data: is neither local nor on gs:// or s3://"):
        open_source(TEST)
