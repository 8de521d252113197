"""The openclipart dataset, from 84 of its drawings: what is taken, the captions, and both forms in which it is written."""

import hashlib
import json
import tarfile
import zlib
from pathlib import Path

import pytest
from pyarrow import parquet

from clipjax import cli
from clipjax.config import ConfigError
from clipjax.data.sets import openclipart
from clipjax.data.sets.drawings import PUBLIC_DOMAIN, Metadata, captions_of, drawings, words_of
from clipjax.data.sets.openclipart import find_collection, prepare_openclipart

COLLECTION = Path(__file__).parent / "openclipart"
SVG = """<svg xmlns="http://www.w3.org/2000/svg"><metadata><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"><cc:Work>
<dc:title>{title}</dc:title><dc:description/>
<dc:subject><rdf:Bag><rdf:li>{keyword}</rdf:li></rdf:Bag></dc:subject><cc:license rdf:resource="{licence}"/>
</cc:Work></rdf:RDF></metadata></svg>"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "openclipart"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(openclipart.FOLDER_VARIABLE, str(COLLECTION))
        text = prepare_openclipart(folder)
    return folder, text


def metadata(title, keywords=(), description="", path="animals/owl_01"):
    return Metadata(path, title, keywords, description, "", PUBLIC_DOMAIN[0])


@pytest.mark.parametrize(
    ("known", "same_title", "captions"),
    [
        (metadata("Owl"), 1, ("Owl",)),
        (metadata("Owl", ("bird", "owl", "night bird")), 1, ("Owl", "Owl, bird, night bird")),
        (metadata("", ("bird",)), 62, ("owl", "owl, bird")),
        (metadata("Lemon SVG theme", path="icons/folder_open-green"), 416, ("folder open green",)),
        (metadata("Clipart by Nicu Buculei - book_01", path="office/openBook"), 26, ("open Book",)),
        (metadata("owl"), 5, ("owl",)),  # five drawings of an owl are no collection
        (metadata("Owl", description="A snowy owl."), 1, ("Owl", "A snowy owl.")),
        (metadata("Owl", description="owl!"), 1, ("Owl",)),
        (metadata("Owl", description="me@example.org"), 1, ("Owl",)),
        (metadata("R2", path="x/r_2"), 1, ()),
    ],
)
def test_captions_say_what_a_drawing_is(known, same_title, captions):
    assert captions_of(known, same_title) == captions


def test_a_description_of_several_drawings_is_none():
    assert captions_of(metadata("Owl", description="UK roadsigns"), 1, 29) == ("Owl",)


def test_words_of_a_file_name():
    assert words_of("folderOpen_blue-02") == "folder Open blue"
    assert words_of("simple_d_9") == "simple d 9"  # a card's value is no version


def test_what_is_left_out_is_counted(tmp_path):
    """A foreign licence, a series, the same picture again, no word, a bomb, no picture, a broken SVG and a link."""
    png = next(COLLECTION.rglob("*.png")).read_bytes()
    huge = png[:16] + (20_000).to_bytes(4, "big") * 2 + png[24:]
    gpl = "http://creativecommons.org/licenses/GPL/2.0/"
    cases = {
        "animals/gnu": ("Gnu", gpl, png),
        "shapes/star_1": ("gramastar", PUBLIC_DOMAIN[0], png),
        "animals/owl_01": ("Owl", PUBLIC_DOMAIN[0], png),
        "birds/owl_01": ("Owl", PUBLIC_DOMAIN[0], png),
        "shapes/7": ("7", PUBLIC_DOMAIN[1], png + b"7"),
        "signs/stop": ("Stop", PUBLIC_DOMAIN[1], huge),
        "signs/lost": ("Lost", PUBLIC_DOMAIN[1], None),
    }
    for path, (title, licence, picture) in cases.items():
        svg = tmp_path / "svg" / f"{path}.svg"
        svg.parent.mkdir(parents=True, exist_ok=True)
        svg.write_text(SVG.format(title=title, keyword="hash(0x858dfb8)", licence=licence))
        if picture is not None:
            file = tmp_path / "png" / f"{path}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture)
    (tmp_path / "svg" / "broken.svg").write_text("<svg")
    (tmp_path / "svg" / "link.svg").symlink_to("animals/owl_01.svg")
    taken, left_out = drawings(tmp_path)
    assert [(d.key, d.captions, d.metadata.keywords) for d in taken] == [("animals-owl_01", ("Owl",), ())]
    assert left_out == {
        "licence not stated as public domain": 1,
        "drawn by a program, in a series": 1,
        "same picture as another": 1,
        "no words": 1,
        "more than 16 million pixels": 1,
        "no picture": 1,
    }


def test_the_real_drawings_in_both_forms(prepared):
    folder, text = prepared
    assert "84 drawings of the Open Clip Art Library: 72 train, 12 test." in text
    shards = {}
    for split in ("train", "test"):
        (shard,) = (folder / "wds").glob(f"{split}-*.tar")
        with tarfile.open(shard) as tar:
            shards[split] = {m.name: tar.extractfile(m).read() for m in tar}
            assert {(m.mtime, m.uid, m.uname) for m in tar} == {(0, 0, "")}
    assert [len(members) for members in shards.values()] == [3 * 72, 3 * 12]
    for split, members in shards.items():
        for name in (name for name in members if name.endswith(".json")):
            known, key = json.loads(members[name]), name.removesuffix(".json")
            assert members[f"{key}.txt"].decode() == known["captions"][0]
            assert members[f"{key}.png"] == (COLLECTION / "png" / f"{known['path']}.png").read_bytes()
            assert known["licence"] in PUBLIC_DOMAIN
            assert (zlib.crc32(key.encode()) % 100 >= 95) == (split == "test")
    for split, members in shards.items():
        (file,) = (folder / "parquet").glob(f"{split}-*-of-00001.parquet")
        table = parquet.read_table(file)
        rows = table.to_pylist()
        assert [row["key"] for row in rows] == [name.removesuffix(".png") for name in members if name.endswith(".png")]
        for row in rows:
            known = json.loads(members[f"{row['key']}.json"])
            assert row == known | {
                "image": {"bytes": members[f"{row['key']}.png"], "path": f"{row['key']}.png"},
                "caption": known["captions"][0],
                "key": row["key"],
            }
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        assert features.keys() == set(table.column_names)
        assert features["image"] == {"_type": "Image"}


def test_it_is_built_once_and_the_same_each_time(prepared, tmp_path, monkeypatch, capsys):
    folder, _ = prepared
    monkeypatch.setenv(openclipart.FOLDER_VARIABLE, str(COLLECTION))
    assert cli.main(["data", "prepare", "openclipart", "--out", str(tmp_path / "again")]) == 0
    assert f"clipjax data inspect 'wds:{tmp_path}/again/wds/train-*.tar'" in capsys.readouterr().out

    def digests(of):
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (of / "wds").iterdir()}

    assert digests(tmp_path / "again") == digests(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["again"]
    monkeypatch.setenv(openclipart.FOLDER_VARIABLE, str(tmp_path / "gone"))
    assert prepare_openclipart(folder)  # from what is there
    with pytest.raises(ConfigError, match="CLIPJAX_OPENCLIPART"):
        prepare_openclipart(tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["again"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").touch()
    with pytest.raises(ConfigError, match="holds other things"):
        prepare_openclipart(tmp_path / "full")


def stand_in(folder: Path, name: str, script: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def test_the_packages_are_downloaded_and_unpacked(tmp_path, monkeypatch):
    """With programs of the same names: the packages themselves are 156 MB."""
    monkeypatch.delenv(openclipart.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(openclipart, "INSTALLED", Path("/usr/share/clipjax-has-no-such-folder"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    scratch = tmp_path / "scratch"
    (tmp_path / "bin").mkdir()
    scratch.mkdir()
    stand_in(tmp_path / "bin", "apt-get", 'echo "$@" > called; touch openclipart-png_1.deb openclipart-svg_1.deb')
    unpack = 'd="$3/usr/share/clipjax-has-no-such-folder/$(basename "$2" | cut -c13-15)"; mkdir -p "$d"'
    stand_in(tmp_path / "bin", "dpkg-deb", unpack)
    found = find_collection(scratch)
    assert sorted(p.name for p in found.iterdir()) == ["png", "svg"]
    assert (scratch / "called").read_text() == "-q download openclipart-png openclipart-svg\n"
    stand_in(tmp_path / "bin", "apt-get", "echo 'E: Unable to locate package openclipart-png' >&2; exit 100")
    with pytest.raises(ConfigError, match=r"Unable to locate package.*apt-get update"):
        find_collection(scratch)


def test_without_apt_the_message_says_where_to_get_them(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(openclipart.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(openclipart, "INSTALLED", tmp_path / "none")
    monkeypatch.setattr(openclipart, "which", lambda name: None)
    assert cli.main(["data", "prepare", "openclipart", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "https://packages.debian.org/openclipart-svg" in said
    assert "CLIPJAX_OPENCLIPART" in said
    assert not list(tmp_path.iterdir())
