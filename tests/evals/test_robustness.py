import numpy as np
import pytest
from scipy.special import expit, logit

from clipjax.config import ConfigError
from clipjax.evals import results
from clipjax.evals.results import Row
from clipjax.evals.robustness import fitted, read_reference, robustness, table

STANDARD = [0.5, 0.6, 0.7, 0.8]


def on_line(x, slope=0.9, intercept=-1.0):
    return expit(slope * logit(np.array(x)) + intercept)


def reference(folder, text):
    (folder / "reference.csv").write_text(text)
    return str(folder / "reference.csv")


def test_a_model_on_the_line_has_none_and_one_above_has_the_difference():
    y = on_line(STANDARD)
    one = fitted("sketch", 0.65, float(on_line(0.65)), STANDARD, y.tolist())
    assert (one.slope, one.intercept, one.r2, one.models) == pytest.approx((0.9, -1.0, 1.0, 4))
    assert one.effective == pytest.approx(0, abs=1e-12)
    assert fitted("sketch", 0.65, float(on_line(0.65)) + 0.2, STANDARD, y.tolist()).effective == pytest.approx(0.2)


def test_models_without_one_of_the_accuracies_do_not_count():
    y = [*on_line(STANDARD).tolist(), 0.99, np.nan]
    found = fitted("sketch", 0.65, 0.5, [*STANDARD, np.nan, 0.7], y)
    assert (found.models, found.slope) == (4, pytest.approx(0.9))
    with pytest.raises(ConfigError, match="reference = 'sketch': 2 models of the reference have both accuracies"):
        fitted("sketch", 0.65, 0.5, [0.5, 0.6, np.nan], [0.1, 0.2, 0.3])


def test_of_the_results_of_a_suite(tmp_path):
    known = dict(model="run", pretrained="step 3", main_metric="acc1")
    accuracies = dict(i=0.6, s=0.4, other=0.3)
    rows = [Row(name=name, dataset=name, task="zeroshot", main=x, metrics={}, **known) for name, x in accuracies.items()]
    rows += [Row(name="all", dataset="all", task="mean", main=0.5, metrics={}, **known)]
    rows += [Row(name="r", dataset="r", task="zeroshot", main=None, metrics={}, absent="not prepared", **known)]
    results.write(tmp_path, rows)
    lines = [f"m{k},{x},{y},{y},{y}" for k, (x, y) in enumerate(zip(STANDARD, on_line(STANDARD), strict=True))]
    file = reference(tmp_path, "\n".join(["model,i,s,r,all", *lines, "m9,,0.5,,"]))
    (found,) = robustness(tmp_path, file, "i")
    assert (found.name, found.accuracy, found.expected) == ("s", 0.4, pytest.approx(on_line(0.6)))
    assert table([found]).splitlines()[1].split()[:3] == ["s", "0.4000", f"{on_line(0.6):.4f}"]
    with pytest.raises(ConfigError, match=r"on = 'r': .* has no such set; it has i, s, other"):
        robustness(tmp_path, file, "r")
    with pytest.raises(ConfigError, match=r"reference = .* has no other set of"):
        robustness(tmp_path, reference(tmp_path, "model,i,r\na,0.5,0.5\n"), "i")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model,i\na,76.1", "'76.1': i must have accuracies"),
        ("model,i", "must be a CSV"),
        ("model,i\na,.7\nb,.8,.9", "row 2 below the first has more fields"),
    ],
)
def test_what_is_no_reference_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_reference(reference(tmp_path, text))
    with pytest.raises(ConfigError, match="No such file"):
        read_reference(str(tmp_path / "none.csv"))
