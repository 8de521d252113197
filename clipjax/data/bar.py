"""A bar of progress on stderr, with the rate and the time left: a line that is redrawn on a terminal, else one every 30 s."""

import sys
from typing import Any

from tqdm import tqdm

DELAY = 5.0  # seconds before a bar is shown: what is done sooner needs none


def bar(name: str, total: int, unit: str, *, quiet: bool = False, **more: Any) -> tqdm:
    """A bar of tqdm; call its `update(n)`, and close it or leave its `with` block. `unit`: of what is counted; `more`: tqdm's."""
    live = sys.stderr.isatty()
    pace: dict[str, Any] = dict(delay=DELAY, mininterval=0.5 if live else 30, leave=not live)
    pace |= {} if live else dict(file=_LogLines(), ascii=True, ncols=len(name) + 70)  # a long name must not cut off the rate
    return tqdm(desc=name, total=total, unit=f" {unit}", unit_scale=True, disable=quiet, **pace | more)


class _LogLines:
    """A stream for tqdm that is no terminal: each state of the bar is a line of its own."""

    def write(self, text: str) -> None:
        if state := text.strip():
            print(state, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass
