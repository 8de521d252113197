"""`clipjax data prepare emoji --style twitter`: the emoji as Twitter draws them (Twemoji), with the same names and splits.

A real shift for a model that was trained on `emoji`: what is shown stays, how it is drawn changes. The pictures are those of
emoji-datasource-twitter, a package of npm's (MIT); Twemoji are Twitter's, under CC-BY 4.0.
"""

import hashlib
import io
import json
import os
import tarfile
import urllib.request
from collections.abc import Iterator
from typing import ClassVar

import emoji
from PIL import Image

from clipjax.config import ConfigError, require
from clipjax.data.images.modes import rgb
from clipjax.data.sets.emoji import key_of
from clipjax.files import local_path

PACKAGE, RELEASE = "emoji-datasource-twitter", "16.0.0"
URL = f"https://registry.npmjs.org/{PACKAGE}/-/{PACKAGE}-{RELEASE}.tgz"
SHA512 = (
    "ec5fae0ae1c7fbb427adcd793f9b676ef2a483d13ab65ce2e0c9d3dae5b54653"
    "78a4b613cdae9c3ff76cb487d20ccb698c52d6b997b05a0f2305bb8bd9ec842d"
)
FILE_VARIABLE = "CLIPJAX_EMOJI_TWITTER"
PICTURES = "package/img/twitter/64/"
SECONDS = 60  # without an answer


class Twitter:
    """The pictures of the package, 64 pixels square."""

    kind: ClassVar[str] = "package"

    @property
    def version(self) -> str:
        return f"{PACKAGE} {RELEASE}"

    def images(self) -> Iterator[tuple[str, Image.Image]]:
        """Every fully-qualified sequence that the package has, with its picture on white, RGB.

        Downloads the package, 62 MB, or reads the file that CLIPJAX_EMOJI_TWITTER names. Raises ConfigError without it."""
        names, pictures = _read(_package())
        for sequence, data in emoji.EMOJI_DATA.items():
            picture = pictures.get(names.get(key_of(sequence), ""))
            if data["status"] == emoji.STATUS["fully_qualified"] and picture is not None:
                yield sequence, rgb(Image.open(io.BytesIO(picture)))


def _package() -> bytes:
    if chosen := os.environ.get(FILE_VARIABLE):
        file = local_path(FILE_VARIABLE, chosen)
        require(file.is_file(), FILE_VARIABLE, chosen, f"there is no such file; download {URL}")
        content = file.read_bytes()
    else:
        try:
            with urllib.request.urlopen(URL, timeout=SECONDS) as answer:
                content = answer.read()
        except OSError as error:
            remedy = f"can't be downloaded ({error}): bring the file here and set {FILE_VARIABLE} to it"
            raise ConfigError(f"emoji: {URL}: {remedy}") from error
    require(hashlib.sha512(content).hexdigest() == SHA512, FILE_VARIABLE, chosen, f"is not the file of {URL}: download that")
    return content


def _read(package: bytes) -> tuple[dict[str, str], dict[str, bytes]]:
    """The file name of each key (see `key_of`), and the content of each file."""
    names, pictures = {}, {}
    with tarfile.open(fileobj=io.BytesIO(package)) as tar:
        for member in tar:
            if member.name == "package/emoji.json" and (table := tar.extractfile(member)):
                for entry in json.load(table):
                    for drawn in (entry, *entry.get("skin_variations", {}).values()):
                        names["-".join(f"{int(code, 16):x}" for code in drawn["unified"].split("-"))] = drawn["image"]
            elif member.name.startswith(PICTURES) and (picture := tar.extractfile(member)):
                pictures[member.name.removeprefix(PICTURES)] = picture.read()
    return names, pictures
