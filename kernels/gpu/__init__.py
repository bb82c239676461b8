"""Shared parts of the Triton kernels: the scan over time, projections, launches and ahead-of-time compilation.

Device code is in `triton_kernels`. The folder imports nothing else of this package; operations import it in functions,
because Triton need not be installed.
"""
