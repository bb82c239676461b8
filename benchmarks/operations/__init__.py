"""The operations that are measured, a module each.

A module has `full_cases(dtype)` and `tiny_cases(dtype)`, which yield an `OpCase` for each size. `benchmarks.cases`
finds the modules, so a new operation adds one file. They import `benchmarks.case` and the operation that they measure.
"""
