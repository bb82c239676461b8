"""Device code of the scan along routes for one state per channel, cut into chunks that run at the same time.

B batch, K routes, E channels, L = H W positions, R rank of the step size, P = K (R + 2) columns of x_dbl,
T steps of a chunk, C chunks of an order, BE channels of one program

An order is a sequence of the L positions; the routes of an order read it forwards or backwards. A program is one warp.
It owns BE channels of one chunk of one order, holds them in registers as T vectors, and serves every route of the order
from that one read. Time runs inside a thread, so a scan needs neither shuffles nor barriers. Only the step sizes, a
product of T x R by R x BE on the tensor cores, pass between threads, through shared memory.

Three launches make a scan: `chunk_ends` scans every chunk from a zero state, `carry` carries the states from
chunk to chunk, and `scan_chunks` starts every chunk from its state. Backwards, `adjoint_ends`, `carry` and
`scan_gradients` do the same against time.

All tensors are contiguous with channels last: x, y and their gradients are (B, L, E), x_dbl is (B, L, P), and
values of chunks are (B, K, C, E). weights is dt_proj as (K, R, E) in x's dtype. codes holds 2 k + flipped of every
route k of the order, 16 bits each, for up to four routes; count is their number. A program keeps its chunk in the time
of the current route and reverses it if the next route runs the other way.

Steps past the end of the order visit its last position again with a step size of 0, which changes nothing.
"""
