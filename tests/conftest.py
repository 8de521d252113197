"""Every test session has eight simulated devices and strict settings, so that no test depends on the machine."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax

CACHE = Path(os.environ.get("CLIPJAX_TEST_CACHE", Path(tempfile.gettempdir()) / "clipjax-test-cache"))

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
