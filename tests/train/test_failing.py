"""One of two real processes fails: both end soon with its message, and no finished checkpoint is lost."""

import pytest

from tests import hosts
from tests.test_distributed import messages


def steps_on_disk(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def train(tmp_path, **env):
    env = {"WORKDIR": str(tmp_path / "run"), "CLIPJAX_HEARTBEAT_SECONDS": "5"} | env
    with hosts.started(2, ["-m", "tests.train.failing"], tmp_path, **env) as both:
        statuses = hosts.ended(both, 300)
        return both, statuses


@pytest.mark.parametrize(
    ("does", "who", "message", "last"),
    [
        ("evaluation", 1, "TypeError: a mistake in the evaluation", 4),
        pytest.param("evaluation", 0, "TypeError: a mistake in the evaluation", 4, marks=pytest.mark.slow),
        pytest.param("data", 1, "TypeError: a mistake in the data", 4, marks=pytest.mark.slow),
        pytest.param("save", 1, "a checkpoint could not be written (File too large); the last good", 2, marks=pytest.mark.slow),
        pytest.param("metrics", 0, "No space left on device; the last good checkpoint is", 4, marks=pytest.mark.slow),
    ],
)
def test_one_that_fails_ends_both_and_costs_no_checkpoint(does, who, message, last, tmp_path):
    both, statuses = train(tmp_path, DOES=does, WHO=str(who))
    assert statuses == [1, 1], hosts.report(both)
    (line,) = [line for host in both for line in messages(host)]
    assert line.startswith(f"clipjax: process {who} ("), hosts.report(both)
    assert message in both[who].complained
    assert steps_on_disk(tmp_path / "run")[-1] == last
    if (does, who) != ("evaluation", 0):
        return  # one that resumes is enough
    resumed, statuses = train(tmp_path, DOES="")
    assert statuses == [0, 0], hosts.report(resumed)
    assert f"resuming at step {last} of 6" in resumed[0].complained
