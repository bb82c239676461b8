"""The measured operations, one module each.

A module has `full_cases(dtype)` and `tiny_cases(dtype)`, which yield an `OpCase` for each size. `benchmarks.cases`
finds the modules, so a new operation adds one file. A module imports `benchmarks.case` and the operation it measures.
"""
