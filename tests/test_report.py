"""`clipjax report`: what the page says, that it fetches nothing, and what it does without checkpoints or suites."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from PIL import Image

from clipjax import cli, config
from clipjax.config import ConfigError
from clipjax.data.sources import open_source
from clipjax.evals import results
from clipjax.evals.embed import Pairs
from clipjax.evals.evaluation import Examples
from clipjax.evals.results import Row
from clipjax.report import gallery
from clipjax.report.curves import POINTS, evaluation_panels, thinned, training_panels
from clipjax.report.folders import differences, read_folders, same_but_for_seed
from clipjax.report.page import make_page
from clipjax.report.reference import read_reference, reference_panels
from clipjax.report.scores import last_evaluations
from tests.evals.test_loaded import save
from tests.evals.tiny import MODEL, WORDS

RUN = config.Run(data=config.Data(spec="emoji"), model=MODEL, train=config.Train(steps=3000, batch_size=16))
HITS = np.repeat([1.0, 0.0], [30, 10])


def write_run(folder, seed=0, hits=HITS, steps=range(10, 60, 10), **changes):
    """A workdir without checkpoints: its configuration, curves and the results of a suite."""
    folder.mkdir()
    run = replace(RUN, seed=seed, **changes)
    (folder / "config.json").write_text(config.to_json(run))
    lines = [dict(step=s, loss=1 / s, lr=None if s == 10 else 0.1) for s in steps]
    lines.append(dict(step=50, task="zeroshot_retrieval", dataset="d/test", metrics={"image_retrieval_recall@1": 0.25}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 60, "lo')
    acc1 = float(hits.mean())
    row = Row(
        name="imagenet-1k", dataset="tfds:x/test", model=folder.name, pretrained="step 50", task="zeroshot_classification",
        metrics={"acc1": acc1}, main_metric="acc1", main=acc1, main_of=("acc1",), ci95=(0.6, 0.9), n=40,
    )  # fmt: skip
    missing = replace(row, name="food", main=None, ci95=None, n=0, metrics={}, absent="no such <folder>")
    results.write(folder / "suites" / "quick", [row, missing])
    names = ["cat", "dog"] * 20
    facts = {"class": names, "predicted": [n if hit else "dog & cow" for n, hit in zip(names, hits, strict=True)]}
    examples = [Examples([str(i) for i in range(40)], {"acc1": hits}, facts=facts)]
    for name in ("imagenet-1k", "food"):  # food was there when the suite was evaluated before
        results.write_examples(folder / "suites" / "quick", name, examples)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    better = np.minimum(HITS + (np.arange(40) >= 34), 1)
    return [
        write_run(folder / "one"),
        write_run(folder / "two", seed=1, hits=better),
        write_run(folder / "three", optim=config.Optim(lr=1e-3)),
    ]


class Page(HTMLParser):
    """The addresses of a page, and its text."""

    def __init__(self, html):
        super().__init__()
        self.addresses, self.text, self.tags = [], "", set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_data(self, data):
        self.text += f" {data.strip()}" if data.strip() else ""


@pytest.fixture(scope="module")
def page(runs):
    return Page(make_page([str(run) for run in runs], load=False))


def test_the_page_fetches_nothing(page):
    assert page.addresses
    assert not [a for a in page.addresses if not a.startswith(("data:image/", "#"))]
    assert not page.tags & {"script", "link", "iframe"}


def test_figures_have_intervals_and_seeds_a_spread(page):
    assert (
        "imagenet-1k n = 40 acc1 0.7500 [0.600, 0.900] 0.9000 [0.600, 0.900] 0.7500 [0.600, 0.900] 0.8250 ± 0.1061" in page.text
    )
    assert "– no such <folder>" in page.text  # escaped: not a tag


def test_runs_are_compared_with_the_first(page):
    found = re.findall(r"quick imagenet-1k acc1 0.7500 (\S+) (\S+) \[(\S+), (\S+)\] 40", page.text)
    assert [row[:2] for row in found] == [("0.9000", "+0.1500"), ("0.7500", "+0.0000")]
    assert float(found[0][2]) == pytest.approx(0.15 - 1.96 * (0.15 * 0.85 / 40) ** 0.5, abs=0.02)
    assert found[1][2:] == ("+0.0000", "+0.0000")
    assert "food acc1 – – – – 0 absent in A: no such <folder>" in page.text


def test_classes_and_confusions(page):
    assert "imagenet-1k: 2 classes" in page.text
    assert "food: 2 classes" not in page.text
    assert "cat 20 0.75 0.90 0.75" in page.text
    assert "cat → dog & cow 5 of 20" in page.text


def test_differences_and_seeds(runs):
    folders = read_folders([str(run) for run in runs])
    assert differences(folders) == [
        ("seed", ["0", "1", "0"]),
        ("optim.lr", [json.dumps(RUN.optim.lr), json.dumps(RUN.optim.lr), "0.001"]),
    ]
    assert same_but_for_seed(folders) == [[0, 1]]


def test_names_are_told_from_each_other(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    a, b = write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run")
    assert [f.name for f in read_folders([str(a), str(b)])] == ["x/run", "y/run"]
    assert [f.name for f in read_folders([str(a), str(a)])] == ["run (1)", "run (2)"]
    with pytest.raises(ConfigError, match=r"DIR = .*no config\.json"):
        read_folders([str(tmp_path)])
    for text in ('{"architectures": ["CLIPModel"]}', '{"train"'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"DIR = .*not that of a run"):
            read_folders([str(tmp_path)])


def test_curves_are_over_examples_and_thinned(tmp_path):
    folders = read_folders([str(write_run(tmp_path / "long", steps=range(1, 5001)))])
    assert [p.title for p in training_panels(folders)] == ["loss", "lr"]
    (panel,) = evaluation_panels(folders)
    assert (panel.title, panel.text) == (
        "image_retrieval_recall@1, d/test",
        "image_retrieval_recall@1, d/test at the end: long 0.25",
    )
    points = thinned(folders[0].training, "loss", 16)
    assert len(points) <= POINTS + 1
    assert (points[0], points[-1]) == ((16, 1.0), (80_000, 1 / 5000))


def test_reference_tables(runs, tmp_path):
    """Columns as in LAION's tables; a dataset may be written in another way."""
    table = tmp_path / "zeroshot_results.csv"
    table.write_text(
        "arch,samples_seen,upstream_dataset,downstream_dataset,acc1\n"
        "ViT-B-32,3e9,LAION-2B,imagenet1k,0.5\nViT-L-14,3e9,LAION-400M,imagenet1k,0.6\nViT-L-14,3e9,LAION-400M,vtab,0.4\n"
    )
    reference = read_reference(str(table))
    assert reference.series("wds/imagenet_1k", "acc1") == {"LAION-2B": [(3e9, 0.5)], "LAION-400M": [(3e9, 0.6)]}
    (panel,) = reference_panels(read_folders([str(runs[0])]), reference)
    assert (panel.title, panel.text) == ("acc1, imagenet-1k", "acc1 on imagenet-1k: one 0.75; others in grey")
    table.write_text("model,acc1\nx,1\n")
    with pytest.raises(ConfigError, match="needs the columns downstream_dataset, total_samples_seen or samples_seen"):
        read_reference(str(table))
    for name in ("broken.csv", "broken.parquet"):
        (tmp_path / name).write_text("a,b\n1\n")
        with pytest.raises(ConfigError, match=f"--reference = .*{name}"):
            read_reference(str(tmp_path / name))


def test_tasks_with_the_same_metric_on_a_dataset_are_apart(tmp_path):
    run = write_run(tmp_path / "run")
    lines = [
        dict(step=50, task=t, dataset="d/test", metrics={"acc1": x})
        for t, x in (("zeroshot_classification", 0.5), ("transfer", 0.7))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folders = read_folders([str(run)])
    found = [(score.set, score.metric, score.cells[0].text) for score in last_evaluations(folders, [])]
    assert found == [("d/test", "acc1", "0.5000"), ("d/test", "transfer acc1", "0.7000")]
    assert [panel.title for panel in evaluation_panels(folders)] == ["acc1, d/test", "transfer acc1, d/test"]


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """The SPEC of ten coloured squares with captions."""
    folder = tmp_path_factory.mktemp("squares")
    for i in range(10):
        Image.new("RGB", (8, 8), (25 * i, 255 - 25 * i, 128)).save(folder / f"{i}.png")
    rows = "".join(f"{i}.png\t{word}\n" for i, word in zip(range(10), WORDS, strict=False))
    (folder / "squares.tsv").write_text(f"filepath\ttitle\n{rows}")
    return f"tsv:{folder / 'squares.tsv'}"


def test_galleries_show_right_and_wrong(squares):
    """Nine of the images, the first two with each other's texts: those two are wrong, all others right."""
    numbers = np.array([0, 1, 2, 3, 5, 6, 7, 8, 9])
    image = np.eye(9, dtype=np.float32)
    text = image[[1, 0, *range(2, 9)]]
    found = gallery.searches(
        open_source(config.Data(spec=squares)), [Pairs(image, text, numbers), Pairs(image, image, numbers)], by_text=True
    )
    ranks = [[answer.rank for answer in search.answers] for search in found]
    assert [first for first, _ in ranks] == [5.5, 5.5, 1, 1, 1, 1]  # 1 + one nearer + half of seven as near
    assert all(own == 1.0 for _, own in ranks)
    assert [search.answers[0].tiles[0].own for search in found] == [False, False, *[True] * 4]
    assert all(search.query.image.startswith("data:image/webp") for search in found)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, squares):
    """A run with weights and a decoder, that evaluates on the squares."""
    model = replace(MODEL, decoder=config.Decoder(depth=1, heads=2, mlp_dim=16))
    run = replace(RUN, model=model, evals=(config.Retrieval(data=squares),))
    return save(run, tmp_path_factory.mktemp("trained") / "run")


def test_the_command_loads_runs_for_galleries(trained, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert cli.main(["report", str(trained), "--out", str(out)]) == 0
    assert re.fullmatch(r".*report.html: 0\.\d MB\n", capsys.readouterr().out)
    text = Page(out.read_text()).text
    for heading in ("an image for a caption", "a caption for an image", "captions that are written", "Geometry"):
        assert heading in text
    assert "No suite has evaluated these runs" in text


def test_without_pictures_no_device_is_taken(runs, tmp_path, monkeypatch):
    """Another process, as a run that trains, may have them."""
    monkeypatch.setattr(jax, "process_index", lambda: pytest.fail("this starts the devices"))
    assert cli.main(["report", *map(str, runs), "--no-pictures", "--out", str(tmp_path / "report.html")]) == 0


def test_a_run_without_checkpoints_has_no_galleries(runs, tmp_path):
    page = Page(make_page([str(runs[0])]))
    assert "no checkpoint" in page.text
    with pytest.raises(ConfigError):
        make_page([str(runs[0])], spec="emoji")
