"""Device code of the scan over time, for K routes over one set of positions at once.

B batch, K routes, E channels, L tokens, N state, NP = N rounded up to even, BE channels of one program

A route visits the L positions in its own order and direction, and has its own A, B, C, D and bias. A program owns BE
neighbouring channels of one sequence and one route; each thread holds all N states of its channels in registers, and
time is sequential. B_t and C_t are rows of float32; all threads read the same numbers, two at a time.

Sequences are cut into chunks of CHUNK steps. The states at the starts of chunks are kept for the backward pass. They
also let a long sequence run in parallel: `chunk_ends` scans each chunk from zero, `carry_states` carries the states
from chunk to chunk, and `scan_forward` with FROM_STATES starts every chunk from its state.
"""
