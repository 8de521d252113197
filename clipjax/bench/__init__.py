"""What `clipjax bench` and benchmarks/ share."""

LOSSES = ("softmax", "sigmoid", "cuaxu")
BATCHES = (4_096, 131_072, 4_194_304)
CPU_DEVICES = 8  # simulated, unless --devices gives another number
