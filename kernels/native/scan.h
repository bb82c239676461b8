// Scans on the CPU, forward and backward: what the functions of all operations share, and how Python calls them.
//
// A plain C interface: Python passes an array of 64-bit integers (sizes, strides, addresses, 0 for what is absent). The
// cpu.h of an operation reads it as a struct; the cpu.py beside it writes the same order after the number of threads.
//
// B batch, E channels, L tokens, N state, G groups, R rank of the step size, J = R + 2N, K taps of the convolution
//
// A block is LANES neighbouring channels, one per vector lane; its N states are N vectors, and time is sequential.
// A tile is [T][LANES] float32, time ascending. Whatever the layout of the tensors, the cores see only tiles.
// Work items and the order of every sum depend on the sizes alone, so results do not depend on the number of threads.

#pragma once

#include "vectors.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr i64 WORK_ITEMS = 12;  // batch x channel groups that a backward pass aims at: work for every thread at B = 1

struct Rows {  // B_t and C_t: rows[t * pitch + b + n], rows[t * pitch + c + n]
  const float* row;
  i64 pitch, b, c;
};

// States are taken in groups whose vectors fit into registers; a smaller rest follows.
constexpr int GROUP = LANES == 16 ? 16 : 8, GROUP_BACK = 8;

// One tile of one block, where the forward pass meets it.
struct Tile {
  i64 N, T;
  bool reverse;
  const float *dt, *u;
  Rows rows;
  const vf* A2;  // [N], A times log2 e
  vf D;
  i64 at_step(i64 s) const { return reverse ? T - 1 - s : s; }
};

template <int H, bool RECORD>
void scan_states(const Tile& k, i64 first, vf* h, float* y, vf* decays, vf* states) {
  vf local[H];
  UNROLL for (int n = 0; n < H; n++) local[n] = h[first + n];
  for (i64 s = 0; s < k.T; s++) {
    const i64 t = k.at_step(s);
    const float *b = k.rows.row + t * k.rows.pitch + k.rows.b + first, *c = b + (k.rows.c - k.rows.b);
    vf step = load(k.dt + t * LANES), dtx = step * load(k.u + t * LANES), even = load(y + t * LANES), odd = {};
    vf *decay = decays + s * k.N + first, *before = states + s * k.N + first;
    UNROLL for (int n = 0; n < H; n++) {
      vf a = exp2v(step * k.A2[first + n]);
      if (RECORD) {
        decay[n] = a;
        before[n] = local[n];
      }
      local[n] = a * local[n] + dtx * b[n];
      if (n % 2) odd += local[n] * c[n];
      else even += local[n] * c[n];
    }
    store(y + t * LANES, even + odd);
  }
  UNROLL for (int n = 0; n < H; n++) h[first + n] = local[n];
}

// h_t = 2^(dt A2) h + dt u B_t, y_t = C_t . h_t + D u; h is read and left in place. With RECORD also keeps, by step,
// the decays [T][N] and the states before each step, [T + 1][N] with the last state at the end.
template <bool RECORD> void scan_tile(const Tile& k, vf* h, float* y, vf* decays, vf* states) {
  for (i64 i = 0; i < k.T * LANES; i += LANES) store(y + i, k.D * load(k.u + i));
  i64 n = 0;
  for (; n + GROUP <= k.N; n += GROUP) scan_states<GROUP, RECORD>(k, n, h, y, decays, states);
  for (; n + 4 <= k.N; n += 4) scan_states<4, RECORD>(k, n, h, y, decays, states);
  for (; n < k.N; n++) scan_states<1, RECORD>(k, n, h, y, decays, states);
  if (RECORD) memcpy(states + k.T * k.N, h, k.N * sizeof(vf));
}

// What a tile leaves for its backward pass, and what flows through it.
struct TileBack {
  const float* dy;
  const vf *decays, *states;
  vf *g, *dA;   // [N]: gradient of the state from later steps, replaced by that for earlier ones; A's is added to
  vf* lanes;    // [T][pitch]: at rows.b + n and rows.c + n the gradients of B and C per lane, before the sum over lanes
  i64 pitch;
  float *du, *ddt;
};

template <int H, bool FIRST> void walk_states(const Tile& k, const TileBack& w, i64 first) {
  vf g[H], dA[H];
  UNROLL for (int n = 0; n < H; n++) g[n] = w.g[first + n], dA[n] = w.dA[first + n];
  for (i64 s = k.T - 1; s >= 0; s--) {
    const i64 t = k.at_step(s);
    const float *b = k.rows.row + t * k.rows.pitch + k.rows.b + first, *c = b + (k.rows.c - k.rows.b);
    const vf *decay = w.decays + s * k.N + first, *before = w.states + s * k.N + first, *after = before + k.N;
    vf *lane_b = w.lanes + t * w.pitch + k.rows.b + first, *lane_c = lane_b + (k.rows.c - k.rows.b);
    vf step = load(k.dt + t * LANES), dtx = step * load(k.u + t * LANES), dy = load(w.dy + t * LANES);
    vf ddtx = load(w.du + t * LANES), dlog = load(w.ddt + t * LANES);
    UNROLL for (int n = 0; n < H; n++) {
      vf grad = g[n] + dy * c[n];
      ddtx += grad * b[n];
      lane_b[n] = FIRST ? grad * dtx : lane_b[n] + grad * dtx;
      lane_c[n] = FIRST ? dy * after[n] : lane_c[n] + dy * after[n];
      g[n] = grad * decay[n];
      vf q = g[n] * before[n];
      dlog += q * k.A2[first + n];
      dA[n] += q * step;
    }
    store(w.du + t * LANES, ddtx);
    store(w.ddt + t * LANES, dlog);
  }
  UNROLL for (int n = 0; n < H; n++) w.g[first + n] = g[n], w.dA[first + n] = dA[n];
}

// Walk a recorded tile back: leaves the gradients of u in du and of dt in ddt, adds to dD what the tile contributes.
template <bool FIRST> void walk_tile(const Tile& k, const TileBack& w, vf* dD) {
  memset(w.du, 0, k.T * LANES * sizeof(float));
  memset(w.ddt, 0, k.T * LANES * sizeof(float));
  i64 n = 0;
  for (; n + GROUP_BACK <= k.N; n += GROUP_BACK) walk_states<GROUP_BACK, FIRST>(k, w, n);
  for (; n + 4 <= k.N; n += 4) walk_states<4, FIRST>(k, w, n);
  for (; n < k.N; n++) walk_states<1, FIRST>(k, w, n);
  vf sum = *dD;
  for (i64 i = 0; i < k.T * LANES; i += LANES) {
    vf x = load(k.u + i), dy = load(w.dy + i), ddtx = load(w.du + i);
    sum += dy * x;
    store(w.du + i, load(k.dt + i) * ddtx + k.D * dy);
    store(w.ddt + i, x * ddtx + LN2 * load(w.ddt + i));
  }
  *dD = sum;
}

// Tile number i of a sequence in scan order covers [start, start + T).
struct TileRange {
  i64 start, T;
  TileRange(i64 i, i64 L, i64 chunk, bool reverse) {
    i64 from = i * chunk, to = lesser(L, from + chunk);
    start = reverse ? L - to : from;
    T = to - from;
  }
};

// Sum the lanes of T rows of `columns` vectors (a multiple of LANES).
void reduce_lanes(const vf* lanes, i64 T, i64 columns, float* out) {
  for (i64 i = 0; i < T * columns; i += LANES) store(out + i, sum_lanes(lanes + i));
}

// ---- work items ----------------------------------------------------------------------------------------------------

int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

struct Block {  // channels e to e + lanes, all in group g
  i64 g, e, lanes;
  Block(i64 index, i64 E, i64 G) {
    i64 per_group = E / G, blocks = ceil_div(per_group, LANES);
    g = index / blocks;
    e = g * per_group + index % blocks * LANES;
    lanes = lesser(LANES, (g + 1) * per_group - e);
  }
};

// How the blocks of one group of channels are shared out among work items: `parts` items of `blocks_each`.
struct Parts {
  i64 blocks_each, parts;
  Parts(i64 blocks, i64 batch_items) {
    i64 wanted = lesser(blocks, ceil_div(WORK_ITEMS, batch_items));
    blocks_each = ceil_div(blocks, wanted);
    parts = ceil_div(blocks, blocks_each);
  }
};

// What one thread needs to take tiles back: the recording of one tile, and what each of its blocks keeps between tiles.
struct Walker {
  float *u, *dt, *slope, *z, *dout, *y, *dy, *du, *ddt;
  vf *h, *decays, *states, *lanes, *kept;
  i64 kept_pitch;
  Walker(Cutter& s, i64 N, i64 R, i64 chunk, i64 columns, i64 blocks) {
    float** tiles[] = {&u, &dt, &slope, &z, &dout, &y, &dy, &du, &ddt};
    for (float** tile : tiles) *tile = s.take<float>(chunk * LANES);
    h = s.take<vf>(N);
    decays = s.take<vf>(chunk * N);
    states = s.take<vf>((chunk + 1) * N);
    lanes = s.take<vf>(chunk * columns);
    kept_pitch = 3 * N + 2 * R + 4;
    kept = s.take<vf>(blocks * kept_pitch);
  }
  Walker of(i64 block) const {  // the same, with the kept share of another block
    Walker w = *this;
    w.kept += block * kept_pitch;
    return w;
  }
};

// One block's share of Walker::kept. The gradients come first and in the order of the records that leave the thread.
struct Kept {
  vf *dA, *dD, *dbias, *dW, *A2, *W, *D, *bias, *g;
  Kept(vf* p, i64 N, i64 R) {
    dA = p, dD = dA + N, dbias = dD + 1, dW = dbias + 1;
    A2 = dW + R, W = A2 + N, D = W + R, bias = D + 1, g = bias + 1;
  }
};
inline i64 record_size(i64 N, i64 R) { return N + 2 + R; }

}  // namespace
