// Matrix products of float32 tiles that lie in a cache, and how rows of a tensor become such tiles.

#pragma once

#include "scan.h"

namespace {

constexpr int TILE_ROWS = 6, TILE_VECTORS = LANES == 16 ? 4 : 2;  // accumulators that fit into the registers

// c[i][j] (+)= sum_k a[i row + k step] b[k][j] for M rows and V vectors of columns.
template <int M, int V, bool ADD>
inline void product_block(i64 K, const float* a, i64 row, i64 step, const float* b, i64 b_pitch, float* c, i64 c_pitch) {
  vf sum[M][V];
  UNROLL for (int i = 0; i < M; i++) UNROLL for (int v = 0; v < V; v++)
    sum[i][v] = ADD ? load(c + i * c_pitch + v * LANES) : vf{};
  for (i64 k = 0; k < K; k++) {
    vf right[V];
    UNROLL for (int v = 0; v < V; v++) right[v] = load(b + k * b_pitch + v * LANES);
    UNROLL for (int i = 0; i < M; i++) {
      const float left = a[i * row + k * step];
      UNROLL for (int v = 0; v < V; v++) sum[i][v] += left * right[v];
    }
  }
  UNROLL for (int i = 0; i < M; i++) UNROLL for (int v = 0; v < V; v++) store(c + i * c_pitch + v * LANES, sum[i][v]);
}
template <int V, bool ADD>
void product_columns(i64 M, i64 K, const float* a, i64 row, i64 step, const float* b, i64 b_pitch, float* c,
                     i64 c_pitch) {
  i64 i = 0;
  for (; i + TILE_ROWS <= M; i += TILE_ROWS)
    product_block<TILE_ROWS, V, ADD>(K, a + i * row, row, step, b, b_pitch, c + i * c_pitch, c_pitch);
  a += i * row, c += i * c_pitch;
  switch (M - i) {
    case 1: return product_block<1, V, ADD>(K, a, row, step, b, b_pitch, c, c_pitch);
    case 2: return product_block<2, V, ADD>(K, a, row, step, b, b_pitch, c, c_pitch);
    case 3: return product_block<3, V, ADD>(K, a, row, step, b, b_pitch, c, c_pitch);
    case 4: return product_block<4, V, ADD>(K, a, row, step, b, b_pitch, c, c_pitch);
    case 5: return product_block<5, V, ADD>(K, a, row, step, b, b_pitch, c, c_pitch);
  }
}
// c (+)= a b for M x K and K x columns, a multiple of LANES. Element (i, k) of a is a[i row + k step], so that a
// transposed matrix needs no copy.
template <bool ADD>
void product(i64 M, i64 columns, i64 K, const float* a, i64 row, i64 step, const float* b, i64 b_pitch, float* c,
             i64 c_pitch) {
  i64 j = 0;
  for (; j + TILE_VECTORS * LANES <= columns; j += TILE_VECTORS * LANES)
    product_columns<TILE_VECTORS, ADD>(M, K, a, row, step, b + j, b_pitch, c + j, c_pitch);
  for (; j < columns; j += LANES) product_columns<1, ADD>(M, K, a, row, step, b + j, b_pitch, c + j, c_pitch);
}

struct HeadRows {  // (B, L, H, width), the last stride is 1
  i64 address, is_bf16, stride_b, stride_l, stride_h;
};

template <class S> void load_rows_as(const S* p, i64 stride, i64 T, i64 width, float* tile, i64 pitch) {
  for (i64 t = 0; t < T; t++, p += stride, tile += pitch) {
    i64 j = 0;
    for (; j + LANES <= width; j += LANES) store(tile + j, load(p + j));
    for (; j < width; j++) tile[j] = to_float(p[j]);
    for (; j < pitch; j++) tile[j] = 0.0f;
  }
}
// T rows of one head as [T][pitch] float32, zeros past the width.
void load_row_tile(const HeadRows& x, i64 b, i64 h, i64 t, i64 T, i64 width, float* tile, i64 pitch) {
  const i64 first = b * x.stride_b + t * x.stride_l + h * x.stride_h;
  if (x.is_bf16) load_rows_as(at<const bf16>(x.address) + first, x.stride_l, T, width, tile, pitch);
  else load_rows_as(at<const float>(x.address) + first, x.stride_l, T, width, tile, pitch);
}
template <class S> void store_rows_as(S* p, i64 stride, i64 T, i64 width, const float* tile, i64 pitch) {
  for (i64 t = 0; t < T; t++, p += stride, tile += pitch) {
    i64 j = 0;
    for (; j + LANES <= width; j += LANES) store(p + j, load(tile + j));
    for (; j < width; j++) from_float(p + j, tile[j]);
  }
}
void store_row_tile(const HeadRows& x, i64 b, i64 h, i64 t, i64 T, i64 width, const float* tile, i64 pitch) {
  const i64 first = b * x.stride_b + t * x.stride_l + h * x.stride_h;
  if (x.is_bf16) store_rows_as(at<bf16>(x.address) + first, x.stride_l, T, width, tile, pitch);
  else store_rows_as(at<float>(x.address) + first, x.stride_l, T, width, tile, pitch);
}

// The sum of the lanes, in a fixed order.
inline float sum_of(vf v) {
  float sum = v[0];
  for (int i = 1; i < LANES; i++) sum += v[i];
  return sum;
}

}  // namespace
