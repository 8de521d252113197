"""`clipjax` in a folder of its own for each process, whose path is that of APART and the number: hosts whose disks differ."""

import os
import sys

from clipjax import cli

if __name__ == "__main__":
    os.chdir(os.environ["APART"] + os.environ["JAX_PROCESS_ID"])
    sys.exit(cli.main())
