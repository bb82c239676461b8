// The selective scan of one direction, any strides, channels in groups that share B and C.

#pragma once

#include "scan.h"

namespace {

struct RowTensor {  // (B, G, N, L)
  i64 address, is_bf16, stride_b, stride_g, stride_n, stride_l;
};

struct SelectiveScan {
  i64 threads, B, E, L, N, G, reverse, softplus, chunk;
  Tensor u, delta, z, out;
  i64 A, D, bias;
  RowTensor b, c;
  i64 states, last;
  // the rest is for the backward pass
  Tensor dout;
  i64 dlast;
  Tensor du, ddelta, dz;
  i64 dA, dD, dbias, dB, dC;
};

// (N, L) of one batch element and group as columns of rows (L, pitch).
template <class S> void pack_rows(const RowTensor& x, i64 b, i64 g, i64 N, i64 L, float* rows, i64 pitch) {
  const S* p = at<const S>(x.address) + b * x.stride_b + g * x.stride_g;
  if (sizeof(S) == 4 && x.stride_l == 1) return transpose_copy((const float*)p, x.stride_n, N, L, rows, pitch);
  for (i64 t = 0; t < L; t++)
    for (i64 n = 0; n < N; n++) rows[t * pitch + n] = to_float(p[n * x.stride_n + t * x.stride_l]);
}
void pack_rows(const SelectiveScan& p, i64 item, float* rows) {
  i64 b = item / p.G, g = item % p.G;
  for (int which = 0; which < 2; which++) {
    const RowTensor& x = which ? p.c : p.b;
    if (x.is_bf16) pack_rows<bf16>(x, b, g, p.N, p.L, rows + which * p.N, 2 * p.N);
    else pack_rows<float>(x, b, g, p.N, p.L, rows + which * p.N, 2 * p.N);
  }
}

void step_size_tile(const SelectiveScan& p, i64 T, vf bias, float* dt, float* slope) {
  for (i64 i = 0; i < T * LANES; i += LANES) {
    vf x = load(dt + i) + bias, d = splat(1.0f);
    store(dt + i, p.softplus ? softplus(x, slope ? &d : nullptr) : x);
    if (slope) store(slope + i, d);
  }
}

void scan_block(const SelectiveScan& p, i64 b, const Block& k, const float* rows, vf* states, vf* h, vf* A2, float* u,
                float* dt, float* z, float* y) {
  const i64 tiles = ceil_div(p.L, p.chunk);
  vf D = {}, bias = {};
  load_weights(p.A, k.e, k.lanes, p.N, LOG2E, false, A2);
  if (p.D) load_weights(p.D, k.e, k.lanes, 1, 1.0f, false, &D);
  if (p.bias) load_weights(p.bias, k.e, k.lanes, 1, 1.0f, false, &bias);
  for (i64 n = 0; n < p.N; n++) h[n] = vf{};
  for (i64 i = 0; i < tiles; i++) {
    TileRange r(i, p.L, p.chunk, p.reverse);
    if (states)
      for (i64 n = 0; n < p.N; n++) states[i * p.N + n] = h[n];
    load_tile(p.u, b, k.e, k.lanes, r.start, r.T, u);
    load_tile(p.delta, b, k.e, k.lanes, r.start, r.T, dt);
    step_size_tile(p, r.T, bias, dt, nullptr);
    Rows bc{rows + r.start * 2 * p.N, 2 * p.N, 0, p.N};
    scan_tile<false>(Tile{p.N, r.T, p.reverse != 0, dt, u, bc, A2, D}, h, y, nullptr, nullptr);
    if (p.z.address) {
      load_tile(p.z, b, k.e, k.lanes, r.start, r.T, z);
      for (i64 j = 0; j < r.T * LANES; j += LANES) {
        vf gate = load(z + j);
        store(y + j, load(y + j) * gate * sigmoid(gate));
      }
    }
    store_tile(p.out, b, k.e, k.lanes, r.start, r.T, y);
  }
  if (p.last) store_weights(h, 1, 0, b * p.E + k.e, k.lanes, p.N, p.last);
}

void walk_block_back(const SelectiveScan& p, i64 b, const Block& k, const TileRange& r, const float* rows,
                     const vf* before, bool first, i64 columns, const Walker& w, Kept& q) {
  load_tile(p.u, b, k.e, k.lanes, r.start, r.T, w.u);
  load_tile(p.delta, b, k.e, k.lanes, r.start, r.T, w.dt);
  load_tile(p.dout, b, k.e, k.lanes, r.start, r.T, w.dy);
  step_size_tile(p, r.T, *q.bias, w.dt, w.slope);
  Rows bc{rows + r.start * 2 * p.N, 2 * p.N, 0, p.N};
  for (i64 n = 0; n < p.N; n++) w.h[n] = before[n];
  const Tile tile{p.N, r.T, p.reverse != 0, w.dt, w.u, bc, q.A2, *q.D};
  scan_tile<true>(tile, w.h, w.y, w.decays, w.states);
  if (p.z.address) {
    load_tile(p.z, b, k.e, k.lanes, r.start, r.T, w.z);
    for (i64 j = 0; j < r.T * LANES; j += LANES) {
      vf z = load(w.z + j), s = sigmoid(z), dout = load(w.dy + j);
      store(w.dy + j, dout * z * s);
      store(w.z + j, dout * load(w.y + j) * s * (1.0f + z * (1.0f - s)));
    }
    store_tile(p.dz, b, k.e, k.lanes, r.start, r.T, w.z);
  }
  const TileBack back{w.dy, w.decays, w.states, q.g, q.dA, w.lanes, columns, w.du, w.ddt};
  first ? walk_tile<true>(tile, back, q.dD) : walk_tile<false>(tile, back, q.dD);
  for (i64 j = 0; j < r.T * LANES; j += LANES) {
    vf ddelta = load(w.ddt + j) * load(w.slope + j);
    *q.dbias += ddelta;
    store(w.ddt + j, ddelta);
  }
  store_tile(p.du, b, k.e, k.lanes, r.start, r.T, w.du);
  store_tile(p.ddelta, b, k.e, k.lanes, r.start, r.T, w.ddt);
}

}  // namespace

// Return 0, or 1 if memory ran out. states and last may be 0.
SSM_API int ssm_selective_scan(const int64_t* arguments) {
  const SelectiveScan& p = *(const SelectiveScan*)arguments;
  const i64 blocks = p.G * ceil_div(p.E / p.G, LANES), tiles = ceil_div(p.L, p.chunk);
  Scratch scratch;
  float *rows, *tile;
  vf* vectors;
  for (int pass = 0; pass < 2; pass++) {
    rows = scratch.take<float>(p.B * p.G * p.L * 2 * p.N);
    tile = scratch.take<float>(p.threads * 4 * p.chunk * LANES);
    vectors = scratch.take<vf>(p.threads * 2 * p.N);
    if (!pass && !scratch.commit()) return 1;
  }
#pragma omp parallel num_threads(p.threads)
  {
    FlushDenormals flush;
    float* mine = tile + thread_number() * 4 * p.chunk * LANES;
    vf* h = vectors + thread_number() * 2 * p.N;
#pragma omp for schedule(dynamic)
    for (i64 i = 0; i < p.B * p.G; i++) pack_rows(p, i, rows + i * p.L * 2 * p.N);
#pragma omp for schedule(dynamic) nowait
    for (i64 i = 0; i < p.B * blocks; i++) {
      i64 b = i / blocks, size = p.chunk * LANES;
      Block k(i % blocks, p.E, p.G);
      vf* states = p.states ? at<vf>(p.states) + i * tiles * p.N : nullptr;
      scan_block(p, b, k, rows + (b * p.G + k.g) * p.L * 2 * p.N, states, h, h + p.N, mine, mine + size,
                 mine + 2 * size, mine + 3 * size);
    }
  }
  return 0;
}

// Return 0, or 1 if memory ran out.
SSM_API int ssm_selective_scan_backward(const int64_t* arguments) {
  const SelectiveScan& p = *(const SelectiveScan*)arguments;
  const i64 group_blocks = ceil_div(p.E / p.G, LANES), blocks = p.G * group_blocks, tiles = ceil_div(p.L, p.chunk);
  const i64 columns = ceil_div(2 * p.N, LANES) * LANES, record = record_size(p.N, 0);
  const Parts share(group_blocks, p.B * p.G);
  Scratch scratch;
  float *rows, *partial;
  vf* records;
  char *walkers, *walkers_end;
  for (int pass = 0; pass < 2; pass++) {
    rows = scratch.take<float>(p.B * p.G * p.L * 2 * p.N);
    partial = scratch.take<float>(p.B * p.G * share.parts * p.L * columns);
    records = scratch.take<vf>(p.B * blocks * record);
    walkers = scratch.take<char>(0);
    for (i64 i = 0; i < p.threads; i++) Walker(scratch, p.N, 0, p.chunk, columns, share.blocks_each);
    walkers_end = scratch.take<char>(0);
    if (!pass && !scratch.commit()) return 1;
  }
  const i64 walker_size = (walkers_end - walkers) / p.threads;
#pragma omp parallel num_threads(p.threads)
  {
    FlushDenormals flush;
    Cutter mine{walkers + thread_number() * walker_size};
    Walker w(mine, p.N, 0, p.chunk, columns, share.blocks_each);
    for (i64 i = 0; i < p.chunk * columns; i++) w.lanes[i] = vf{};
#pragma omp for schedule(dynamic)
    for (i64 i = 0; i < p.B * p.G; i++) pack_rows(p, i, rows + i * p.L * 2 * p.N);
#pragma omp for schedule(dynamic)
    for (i64 i = 0; i < p.B * p.G * share.parts; i++) {
      i64 bg = i / share.parts, b = bg / p.G, first = bg % p.G * group_blocks + i % share.parts * share.blocks_each;
      i64 last = lesser(first + share.blocks_each, (bg % p.G + 1) * group_blocks);
      for (i64 block = first; block < last; block++) {
        Block k(block, p.E, p.G);
        Kept q(w.kept + (block - first) * w.kept_pitch, p.N, 0);
        for (i64 n = 0; n < w.kept_pitch; n++) q.dA[n] = vf{};
        load_weights(p.A, k.e, k.lanes, p.N, LOG2E, false, q.A2);
        if (p.D) load_weights(p.D, k.e, k.lanes, 1, 1.0f, false, q.D);
        if (p.bias) load_weights(p.bias, k.e, k.lanes, 1, 1.0f, false, q.bias);
        if (p.dlast) load_weights(p.dlast, b * p.E + k.e, k.lanes, p.N, 1.0f, false, q.g);
      }
      for (i64 j = tiles - 1; j >= 0; j--) {
        TileRange r(j, p.L, p.chunk, p.reverse);
        for (i64 block = first; block < last; block++) {
          Block k(block, p.E, p.G);
          Kept q(w.kept + (block - first) * w.kept_pitch, p.N, 0);
          const vf* before = at<const vf>(p.states) + ((b * blocks + block) * tiles + j) * p.N;
          walk_block_back(p, b, k, r, rows + bg * p.L * 2 * p.N, before, block == first, columns, w, q);
        }
        reduce_lanes(w.lanes, r.T, columns, partial + (i * p.L + r.start) * columns);
      }
      for (i64 block = first; block < last; block++)
        memcpy(records + (b * blocks + block) * record, w.kept + (block - first) * w.kept_pitch, record * sizeof(vf));
    }
#pragma omp for schedule(dynamic) nowait
    for (i64 i = 0; i < p.B * p.G; i++) {
      float* sum = partial + i * share.parts * p.L * columns;
      for (i64 part = 1; part < share.parts; part++)
        for (i64 j = 0; j < p.L * columns; j += LANES) store(sum + j, load(sum + j) + load(sum + part * p.L * columns + j));
      transpose_copy(sum, columns, p.L, p.N, at<float>(p.dB) + i * p.N * p.L, p.L);
      transpose_copy(sum + p.N, columns, p.L, p.N, at<float>(p.dC) + i * p.N * p.L, p.L);
    }
#pragma omp for schedule(static) nowait
    for (i64 block = 0; block < blocks; block++) {
      Block k(block, p.E, p.G);
      Kept q(records + block * record, p.N, 0);
      store_weights(q.dA, p.B, blocks * record, k.e, k.lanes, p.N, p.dA);
      store_weights(q.dD, p.B, blocks * record, k.e, k.lanes, 1, p.dD);
      store_weights(q.dbias, p.B, blocks * record, k.e, k.lanes, 1, p.dbias);
    }
  }
  return 0;
}
