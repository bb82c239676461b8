"""Several processes on one run: launching, agreeing before the first step, losing one, sharding with FSDP2.

It imports training.checkpoints, training.optim and base.
"""
