"""docs/finetune.md, typed as it stands: every file is written and every command run, on small stand-ins of the real layouts."""

import json
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from clipjax import cli
from tests.export import standins_transformers
from tests.test_docs import BLOCK, FILE, ROOT

PAGE = (ROOT / "docs" / "finetune.md").read_text()
PAIRS = 60
SHORT = {  # what the stand-ins and a test's patience ask for, beside what the page says
    "--data.spec": "tsv:pairs.tsv",
    "--train.steps": "2",
    "--train.batch_size": "8",
    "--train.checkpoint_every": "2",
    "--evals": "none",
    "--optim.schedule.warmup": "1",
}
OTHERS = {"german.py": {"--data.text_field": "title"}, "larger.py": {"--model.image.image_size": "45"}}


@pytest.fixture(scope="module")
def desk(tmp_path_factory, tokenizer):
    """A folder with a table of pairs, a CLIPModel where the hub's id is a path, and the files of the page."""
    folder = tmp_path_factory.mktemp("desk")
    rng, rows = np.random.default_rng(0), ["filepath\ttitle"]
    for i in range(PAIRS):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i}.png\twoman waving number {i}")
    (folder / "pairs.tsv").write_text("\n".join(rows) + "\n")
    model = standins_transformers.clip()
    standins_transformers.written(folder / "openai" / "clip-vit-base-patch32", model, tokenizer)
    for name, code in FILE.findall(PAGE):
        (folder / name).write_text(code)
    return folder


def commands():
    code = [code for language, code in BLOCK.findall(PAGE) if language == "bash"]
    return [shlex.split(line, comments=True)[1:] for block in code for line in block.splitlines()]


@pytest.mark.slow
def test_every_command_of_the_page(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    assert len(commands()) > 10
    for words in commands():
        if words[0] == "train":
            given = SHORT | OTHERS.get(words[1], {})
            if "--evals.0.split" in words:
                given.pop("--evals")
            if words[1] == "german.py":
                shutil.copytree("runs/openai", "runs/emoji")
            words = [*words, *(word for option in given.items() for word in option)]
        if words[0] == "eval":
            words = [*words, "--json", "result.json"]
        assert cli.main(words) == 0, words
    said = capsys.readouterr().err
    assert "image/positions [26, 24] -> [50, 24], bicubic" in said
    assert json.loads((desk / "result.json").read_text())["metrics"]["image_retrieval_recall@10"] >= 0
    lora = json.loads((desk / "runs" / "lora" / "config.json").read_text())
    assert lora["model"]["image"]["lora"]["rank"] == 8
