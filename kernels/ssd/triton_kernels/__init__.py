"""Device code of the SSD: matrix products over blocks of tokens, in one or both directions.

B batch, L tokens, H heads, P channels of a head, G groups, R heads of a group, N state, K chunks of PER_CHUNK blocks of
T tokens

A token reads the others of its chunk directly: the product of C_t . B_s and the decay between them, a T x T tile for
every pair of blocks. It reads tokens outside its chunk through the states that enter the chunk from either side.

Decays are powers of two of float32 sums of log2 exp(dt A). A sum never spans more than one block: between two blocks
the decay is the product of that from the column's token to the edge of its block, that across the blocks between, and
that from the edge of the row's block to its token. None is above 1. Exponentials of pairs of tokens are needed only
inside a block, and there one serves both directions.
"""
