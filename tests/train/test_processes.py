"""Two real processes that JAX has joined: rows of a batch, meshes that can't work, and counts over both."""

import os
import socket
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
import jax
import numpy as np
from clipjax import config, sharding
from clipjax.distributed import require_joined
from clipjax.metrics.clock import DataCounts

jax.config.update("jax_num_cpu_devices", 2)
me = int(sys.argv[2])
jax.distributed.initialize(sys.argv[1], 2, me)
require_joined()
mine = np.arange(8).reshape(4, 2) + 100 * me
for shape in ((4, 1, 1), (1, 4, 1), (2, 1, 2)):
    made = sharding.to_global({"text": mine}, sharding.make_mesh(config.Mesh(data=shape[0], fsdp=shape[1], tensor=shape[2])))
    assert made["text"].shape == (8, 2)
    for shard in made["text"].addressable_shards:
        rows = range(8)[shard.index[0]]
        assert set(rows) <= set(range(4 * me, 4 * me + 4)), (shape, rows)
        np.testing.assert_array_equal(shard.data, mine[[row - 4 * me for row in rows]])
try:
    sharding.to_global({"text": mine}, sharding.make_mesh(config.Mesh(data=1, tensor=4)))
except config.ConfigError as error:
    print("refused:", error)
counts = DataCounts(sharding.make_mesh(config.Mesh(data=2, fsdp=1, tensor=2)))
for _ in range(3):
    counts.count({"replaced": np.array([True, me == 1]), "truncated": np.array([False, False])})
assert counts.read() == {"replaced": 9, "truncated": 0, "bad_share": 0.75}
assert counts.read() == {"replaced": 0, "truncated": 0, "bad_share": 0.0}
assert counts.total == {"replaced": 9, "truncated": 0}
print("done")
"""


def test_two_processes(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "SLURM_NTASKS": "2", "PYTHONPATH": str(Path(__file__).parents[2])}
    started = [
        subprocess.Popen([sys.executable, str(program), address, str(i)], env=env, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    for i, process in enumerate(started):
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 0
        refusal = f"refused: mesh.data = 1, mesh.fsdp = 1, mesh.tensor = 4: process {i} of 2 holds 1 of 1 parts; each needs"
        assert said.startswith(refusal)
        assert said.splitlines()[-1] == "done"
