"""The emoji as Twitter draws them, from a stand-in of the package of npm's: three pictures, one of them of split `test`."""

import hashlib
import io
import json
import tarfile

import emoji as package
import numpy as np
import pytest
from PIL import Image

from clipjax import cli, config
from clipjax.config import ConfigError
from clipjax.data.faults import shown
from clipjax.data.sets import emoji, twitter
from clipjax.data.sets.twitter import Twitter
from clipjax.data.sources import open_source

HAND = "👍\U0001f3ff"
TEST = next(s for s, d in package.EMOJI_DATA.items() if emoji.is_test(s) and d["status"] == 2)
HASH = "#️⃣"


def unified(sequence):
    return "-".join(f"{ord(c):04X}" for c in sequence)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """The file, with a transparent picture, red in its middle, of each of three sequences; of a fourth it has a name alone."""
    picture = Image.new("RGBA", (64, 64))
    picture.paste((255, 0, 0, 255), (16, 16, 48, 48))
    png = io.BytesIO()
    picture.save(png, "png")
    base = dict(unified=unified("👍"), image="absent.png")
    variations = {"1F3FF": dict(unified=unified(HAND), image="hand.png")}
    table = [base | dict(skin_variations=variations), dict(unified=unified(HASH), image="hash.png")]
    table.append(dict(unified=unified(TEST), image="test.png"))
    files = {f"{twitter.PICTURES}{name}.png": png.getvalue() for name in ("hand", "hash", "test")}
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as tar:
        for name, content in {"package/emoji.json": json.dumps(table).encode(), **files}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setenv(twitter.FILE_VARIABLE, str(tmp_path / "package.tgz"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(twitter, "SHA512", hashlib.sha512((tmp_path / "package.tgz").read_bytes()).hexdigest())
    return tmp_path


def test_what_is_drawn_is_found_by_its_code_points(stand_in):
    """`0023-FE0F-20E3` is the key 23-fe0f-20e3; skin tones stand under what they tone; one without a picture is left out."""
    images = dict(Twitter().images())
    assert set(images) == {HAND, HASH, TEST}
    pixels = np.asarray(images[HASH])
    assert pixels.shape == (64, 64, 3)
    assert (pixels[0, 0].tolist(), pixels[32, 32].tolist()) == ([255, 255, 255], [255, 0, 0])


def test_prepare(stand_in, capsys, monkeypatch):
    """Names and splits are those of `emoji`. What is there is not read again."""
    assert not cli.main(["data", "prepare", "emoji", "--style", "twitter"])
    folder = stand_in / "emoji_twitter" / emoji.VERSION
    assert capsys.readouterr().out.split() == [str(folder)]
    source = open_source(config.Data(spec="tfds:emoji_twitter", split="test"))
    (example,) = shown(source, [0])
    assert (len(source), example.record.key) == (1, emoji.key_of(TEST))
    assert example.record.captions == (emoji.names_of(TEST)[0],)
    monkeypatch.delenv(twitter.FILE_VARIABLE)
    monkeypatch.setattr(twitter, "URL", "http://127.0.0.1:9/")
    assert not cli.main(["data", "prepare", "emoji", "--style", "twitter"])


def test_a_file_that_is_not_the_package(stand_in, monkeypatch):
    monkeypatch.setattr(twitter, "SHA512", "0")
    with pytest.raises(ConfigError, match=r"CLIPJAX_EMOJI_TWITTER = .*package.tgz.*: is not the file of https://registry.npmjs"):
        list(Twitter().images())


def test_without_a_network(stand_in, monkeypatch):
    monkeypatch.delenv(twitter.FILE_VARIABLE)
    monkeypatch.setattr(twitter, "URL", "http://127.0.0.1:9/x.tgz")
    with pytest.raises(ConfigError, match=r"can't be downloaded .*: bring the file here and set CLIPJAX_EMOJI_TWITTER"):
        list(Twitter().images())


def test_style_is_of_emoji_alone(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "prepare", "openclipart", "--style", "twitter"])
    assert ended.value.code == 2
    assert "--style: only of emoji" in capsys.readouterr().err


def test_where_it_is_not_there_its_command_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(config.ConfigError, match="clipjax data prepare emoji --style twitter"):
        open_source(config.Data(spec="tfds:emoji_twitter", split="test"))
