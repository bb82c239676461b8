"""Commands except `fit` and `validate`. Each is a module with `add_arguments(parser)` and `run(args)` -> exit code.

They bring models and data together, and import no module of run.
"""
