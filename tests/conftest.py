"""Every test session has eight simulated devices and strict settings, so that no test depends on the machine."""

import os
import signal
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from clipjax import config

# A shell that starts the tests with `&` has them, and all that they start, ignore Ctrl-C, which some of them send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# tests/run.sh sets it: else XLA takes three quarters of the time to optimize programs that run for a millisecond.
QUICK = "CLIPJAX_TEST_QUICK" in os.environ
SIMPLE = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
OLD = jax.__version_info__ < (0, 11)  # later ones end the process at the next flag, which they do not know
SIMPLEST = f"{SIMPLE} --xla_cpu_use_fusion_emitters=false" if OLD else SIMPLE
CACHE = Path(os.environ.get("CLIPJAX_TEST_CACHE", Path(tempfile.gettempdir()) / "clipjax-test-cache"), "quick" if QUICK else "")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
if QUICK:
    os.environ["XLA_FLAGS"] = SIMPLEST
    jax.devices()  # which reads the flags; libtpu reads them later, and ends the process at one that it does not know
    os.environ["XLA_FLAGS"] = SIMPLE


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first, so that no long one is alone in the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture
def uncached():
    """Compiles, whatever the cache holds: XLA's CPU client loses the order of collectives in loops that do not depend on each
    other when it loads a program (jax 0.10.2), and devices then wait for each other in different ones.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # else it keeps to what it found at first
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def registered_classes_go_with_the_test():
    """What a test, or a config file that it loads, adds by `clipjax.register`."""
    before = {union: dict(union.members) for union in config.UNIONS}
    yield
    for union, members in before.items():
        added = union.members.keys() - members.keys()
        for kind in added:
            del union.members[kind]
