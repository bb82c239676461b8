"""Layers that several families share: norms, state-space initialisation, residual sums.

It imports kernels alone.
"""
