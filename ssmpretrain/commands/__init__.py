"""Commands beside those of the Trainer, one module each: `add_arguments(parser)`, and `run(args)`, the exit code.

They bring models and data together, and import no module of run.
"""
