"""The ground floor: whole-file writes, seeds, ranks, wording of messages, the files of a run.

It knows nothing of the rest of the package and imports none of it; every other room may import it.
"""
