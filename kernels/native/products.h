// Small matrix products of tokens and weights, channels in blocks.

#pragma once

#include "scan.h"

namespace {

constexpr i64 TOKEN_TILE = 8;              // tokens per work item of convolution and x_proj
constexpr i64 ROWS = LANES == 16 ? 8 : 4;  // rows of the register tile of a matrix product
constexpr i64 COLUMNS = LANES;             // accumulators of a weight gradient

// out[m][j] = sum_e u[m][e] w[e][j] for M rows of u in blocks and V vectors of columns.
template <int M, int V>
void multiply(const float* u, i64 block_pitch, i64 blocks, const float* w, i64 pitch, float* out) {
  vf sum[M][V] = {};
  for (i64 block = 0; block < blocks; block++)
    for (i64 lane = 0; lane < LANES; lane++) {
      const float *row = w + (block * LANES + lane) * pitch, *x = u + block * block_pitch + lane;
      UNROLL for (int i = 0; i < M; i++) UNROLL for (int v = 0; v < V; v++)
        sum[i][v] += x[i * LANES] * load(row + v * LANES);
    }
  for (int i = 0; i < M; i++)
    for (int v = 0; v < V; v++) store(out + i * pitch + v * LANES, sum[i][v]);
}
// All columns of w, a multiple of LANES, for M rows.
template <int M>
void multiply_rows(const float* u, i64 block_pitch, i64 blocks, const float* w, i64 pitch, i64 columns, float* out) {
  i64 j = 0;
  for (; j + 3 * LANES <= columns; j += 3 * LANES) multiply<M, 3>(u, block_pitch, blocks, w + j, pitch, out + j);
  if (columns - j == 2 * LANES) multiply<M, 2>(u, block_pitch, blocks, w + j, pitch, out + j);
  if (columns - j == LANES) multiply<M, 1>(u, block_pitch, blocks, w + j, pitch, out + j);
}
// All T rows: out[t][j] = sum_e u[t][e] w[e][j].
void multiply_tile(const float* u, i64 block_pitch, i64 blocks, const float* w, i64 pitch, i64 columns, i64 T,
                   float* out) {
  i64 t = 0;
  for (; t + ROWS <= T; t += ROWS)
    multiply_rows<ROWS>(u + t * LANES, block_pitch, blocks, w, pitch, columns, out + t * pitch);
  for (; t < T; t++) multiply_rows<1>(u + t * LANES, block_pitch, blocks, w, pitch, columns, out + t * pitch);
}

// du[m] += sum_j dx[m][j] w[j] for M rows of one block.
template <int M> void add_product(const float* dx, i64 dx_pitch, i64 J, const vf* w, float* du) {
  vf sum[M];
  UNROLL for (int i = 0; i < M; i++) sum[i] = load(du + i * LANES);
  for (i64 j = 0; j < J; j++) UNROLL for (int i = 0; i < M; i++) sum[i] += dx[i * dx_pitch + j] * w[j];
  UNROLL for (int i = 0; i < M; i++) store(du + i * LANES, sum[i]);
}

// sum[j] += sum_m dx[m][j] u[m] over T rows of one block; columns is a multiple of COLUMNS.
void add_weight_gradient(const float* dx, i64 columns, const float* u, i64 T, vf* sum) {
  for (i64 j = 0; j < columns; j += COLUMNS) {
    vf local[COLUMNS];
    UNROLL for (int i = 0; i < COLUMNS; i++) local[i] = sum[j + i];
    for (i64 t = 0; t < T; t++) {
      vf x = load(u + t * LANES);
      UNROLL for (int i = 0; i < COLUMNS; i++) local[i] += dx[t * columns + j + i] * x;
    }
    UNROLL for (int i = 0; i < COLUMNS; i++) sum[j + i] = local[i];
  }
}

// dt = softplus(raw W + bias) of M rows of raw.
template <int M>
void step_size_rows(const float* raw, i64 pitch, i64 R, const vf* W, vf bias, float* dt, float* slope) {
  vf sum[M];
  UNROLL for (int i = 0; i < M; i++) sum[i] = bias;
  for (i64 r = 0; r < R; r++) UNROLL for (int i = 0; i < M; i++) sum[i] += raw[i * pitch + r] * W[r];
  for (int i = 0; i < M; i++) {
    vf d;
    store(dt + i * LANES, softplus(sum[i], slope ? &d : nullptr));
    if (slope) store(slope + i * LANES, d);
  }
}
// dt = softplus(x_dbl[:, :R] W + bias) of one tile; slope is the softplus's, or null.
void step_size_tile(Rows rows, i64 T, i64 R, const vf* W, vf bias, float* dt, float* slope) {
  i64 t = 0;
  const auto take = [&](auto step, i64 count) {
    for (; t + count <= T; t += count)
      step(rows.row + t * rows.pitch, rows.pitch, R, W, bias, dt + t * LANES, slope ? slope + t * LANES : nullptr);
  };
  take(step_size_rows<8>, 8);
  take(step_size_rows<1>, 1);
}

}  // namespace
