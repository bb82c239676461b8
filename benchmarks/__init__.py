"""Benchmarks of operations, encoders, data and memory: `python -m benchmarks.run`."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in ssmpretrain.cli: idle threads do not wait actively
