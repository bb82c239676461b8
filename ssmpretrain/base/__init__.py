"""Ground floor: errors, wording of messages, whole-file writes, seeds, ranks, and the files of a run.

Every room may import base, and base imports no other room. `errors` and `wording` import neither torch nor NumPy.
"""
