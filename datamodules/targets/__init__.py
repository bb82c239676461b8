"""Targets of dense tasks: class maps and objects, decoded, augmented together with their image, and stacked.

It imports decoding, faults and base. The data modules in dense/ read with it.
"""
