"""Memory, FLOPs, collectives and time of the streamed losses beside their dense forms: `clipjax bench loss` as a script.

Run:  python benchmarks/loss.py --batch 8192 --devices 8 --patience 120            time, on a CPU's simulated devices
      python benchmarks/loss.py --topology v5e:16x16 --batch 131072 --width 1152   memory of TPUs (pip install libtpu)
"""

import sys

from clipjax import cli

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "loss"]
    cli.program()
