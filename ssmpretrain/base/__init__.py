"""Ground floor: errors, wording of messages, whole-file writes, seeds, ranks, and the files of a run.

Every room may import it; it imports none of them. `errors` and `wording` import neither torch nor NumPy.
"""
