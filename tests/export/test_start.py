"""From a folder of open_clip's to a fine-tuned run, by the configuration that import writes."""

import json

from clipjax import cli
from clipjax.export.folder import export
from tests.export.models import clip, parameters


def test_the_start_is_what_was_imported(tmp_path, tokenizer, capsys):
    """The evaluation of step 0 equals that of the imported run; the weights of a run that has begun are others."""
    model = clip(dict(activation="quick_gelu", mean=(0.5, 0.4, 0.3)), dict(activation="quick_gelu"))
    export(model, parameters(model), tokenizer, "crop", tmp_path / "theirs", "open_clip", clean="web")
    start = tmp_path / "start"
    assert cli.main(["import", "--from", "open_clip", str(tmp_path / "theirs"), "--out", str(start)]) == 0
    assert cli.main(["eval", "retrieval", str(start), "--data", "emoji", "--json", str(tmp_path / "eval.json")]) == 0
    want = json.loads((tmp_path / "eval.json").read_text())["metrics"]
    short = {"train.steps": 2, "train.batch_size": 16, "train.log_every": 1, "optim.schedule.warmup": 1, "optim.lr": 0.01}
    options = [word for name, value in short.items() for word in (f"--{name}", str(value))]
    start.rename(tmp_path / "moved")  # the file finds the run beside it
    assert cli.main(["train", str(tmp_path / "moved" / "finetune.py"), "--workdir", str(tmp_path / "run"), *options]) == 0
    said = capsys.readouterr().err
    assert f"starts from the weights of {tmp_path}/moved@0 (init.run), at step 0 of 2" in said
    assert "\n  new: 0 parameters in 0 arrays\n" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["metrics"] for line in lines if "task" in line}
    assert found.keys() == {0, 2}
    assert found[0] == {name: value for name, value in want.items() if name in found[0]}
    assert found[2] != found[0]
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (tmp_path / "moved" / "tokenizer.json").read_bytes()
