"""Commands that are no Trainer calls, one module each: `add_arguments(parser)` and `run(args)`, the exit code.

They bring models and data together, and import no module of run.
"""
