"""Measurements that the project stands for: `python -m benchmarks.run`."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # see ssmpretrain.cli.main; here it keeps a neighbour out of the times
