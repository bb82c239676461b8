"""The scan over time on the GPU, for K routes over one set of positions at once; forward.

B batch, K routes, E channels, L tokens, N state, NP = N rounded up to even, BE channels of one program

A route visits the L positions in its own order and direction, and has its own A, B, C, D and bias. A program owns BE
neighbouring channels of one sequence and one route; each thread holds all N states of its channels in registers, and
time is sequential. B_t and C_t come as rows of float32, read by every thread alike, two at a time.

Sequences are cut into chunks of CHUNK steps. The states at the starts of chunks are what the backward pass keeps, and
what lets a long sequence run in parallel: `chunk_ends` scans each chunk from zero, `carry_states` passes the results on
from chunk to chunk, and `scan_forward` with FROM_STATES starts every chunk where it belongs.
"""
