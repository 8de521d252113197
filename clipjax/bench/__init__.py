"""What `clipjax bench` and benchmarks/ share."""

LOSSES = ("softmax", "sigmoid", "cuaxu")
BATCHES = tuple(4096 * 4**n for n in range(6))  # 4,096 to 4,194,304
CPU_DEVICES = 8  # simulated, unless told otherwise
