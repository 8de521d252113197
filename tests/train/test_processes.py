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
from clipjax.metrics.counts import BadExamples, DataCounts

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
bad = BadExamples(0.5)
counts = DataCounts(sharding.make_mesh(config.Mesh(data=2, fsdp=1, tensor=2)), bad)
nothing = {"replaced": 0, "filtered": 0, "truncated": 0}
for step in range(3):
    fault = np.array([4 * (me == 0 and step == 2), me * (1 + step)], np.int8)  # the first is of process 1, can't be read
    flags = {"filtered": np.array([False, me == 0]), "truncated": np.zeros(2, bool)}
    counts.count({"replaced": fault > 0, "fault": fault, "fault_index": np.array([7, 30 + step], np.int32)} | flags)
assert counts.read() == nothing | {"replaced": 4, "filtered": 3, "bad_share": np.float32(4 / 9), "filtered_share": 0.25}
assert counts.read() == nothing | {"bad_share": 0.0, "filtered_share": 0.0}
assert counts.total == nothing | {"replaced": 4, "filtered": 3}
found, empty = bad._newest
assert (found.examples, found.kinds, found.first, found.first_kind) == (9, (1, 1, 1, 1), 30, 0), found
assert (empty.examples, empty.kinds, empty.first) == (0, (0, 0, 0, 0), -1), empty
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
