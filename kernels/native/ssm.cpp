// Selective scans on the CPU: alone, fused into the core of Vim's mixer and of VMamba's. Forward and backward.
//
// A plain C interface: Python passes an array of 64-bit integers (sizes, strides, addresses, 0 for what is absent) that
// is read as the structs below; the cpu.py of each operation writes the same order.
//
// B batch, E channels, L tokens, N state, G groups, R rank of the step size, J = R + 2N, K taps of the convolution
//
// A block is LANES neighbouring channels, one per vector lane; its N states are N vectors, and time is sequential.
// A tile is [T][LANES] float32, time ascending. Whatever the layout of the tensors, the cores see only tiles.
// Work items and the order of every sum depend on the sizes alone, so results do not depend on the number of threads.

#include "bidirectional_scan.h"
#include "cross_scan.h"
#include "selective_scan.h"

