"""Losses on several devices are compiled in each run of the tests, see `uncached`."""

import pytest


@pytest.fixture(autouse=True)
def _uncached(uncached):
    pass
