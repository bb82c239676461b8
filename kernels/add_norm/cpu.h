// RMS norm of rows: out = x r weight with r = 1 / sqrt(mean(x^2) + eps), and its gradients. M rows of D channels.

#pragma once

#include "tiles.h"

namespace {
namespace rows {

constexpr i64 ROWS_OF_ITEM = 64;  // rows whose parts of the weight's gradient are summed first

struct Norm {
  i64 threads, M, D, eps_bits;
  HeadRows x, out;  // (1, M, 1, D)
  i64 weight, inverse;  // (D,) and (M,), float32: 1 / deviation, which the forward pass writes
  // the rest is for the backward pass
  HeadRows dout, dx;
  i64 dweight;

  i64 width() const { return ceil_div(D, 16) * 16; }
  i64 items() const { return ceil_div(M, ROWS_OF_ITEM); }
  float eps() const { return as_float(eps_bits); }
  void load(const HeadRows& from, i64 row, float* tile) const { load_row_tile(from, 0, 0, row, 1, D, tile, width()); }
  void store(const HeadRows& to, i64 row, const float* tile) const { store_row_tile(to, 0, 0, row, 1, D, tile, width()); }
};

}  // namespace rows
}  // namespace

// Return 0, or 1 if memory ran out.
SSM_API int ssm_rms_norm(const int64_t* arguments) {
  using namespace rows;
  const Norm& p = *(const Norm*)arguments;
  const i64 width = p.width();
  Scratch scratch;
  float *weight, *tiles;
  for (int pass = 0; pass < 2; pass++) {
    weight = scratch.take<float>(width);
    tiles = scratch.take<float>(p.threads * width);
    if (!pass && !scratch.commit()) return 1;
  }
  p.load(HeadRows{p.weight, 0, 0, 0, 0}, 0, weight);
#pragma omp parallel num_threads(p.threads)
  {
    FlushDenormals flush;
    float* x = tiles + thread_number() * width;
#pragma omp for schedule(static)
    for (i64 row = 0; row < p.M; row++) {
      p.load(p.x, row, x);
      vf squares = {};
      for (i64 j = 0; j < width; j += LANES) squares += load(x + j) * load(x + j);
      const float r = 1.0f / __builtin_sqrtf(sum_of(squares) / (float)p.D + p.eps());
      at<float>(p.inverse)[row] = r;
      for (i64 j = 0; j < width; j += LANES) store(x + j, load(x + j) * r * load(weight + j));
      p.store(p.out, row, x);
    }
  }
  return 0;
}

// With n = x r and g = dout weight: dx = (g - n mean(g n)) r, dweight = sum of dout n; and out = n weight once more.
// Return 0, or 1 if memory ran out.
SSM_API int ssm_rms_norm_backward(const int64_t* arguments) {
  using namespace rows;
  const Norm& p = *(const Norm*)arguments;
  const i64 width = p.width(), items = p.items();
  Scratch scratch;
  float *weight, *tiles, *parts;
  for (int pass = 0; pass < 2; pass++) {
    weight = scratch.take<float>(width);
    tiles = scratch.take<float>(p.threads * 2 * width);
    parts = scratch.take<float>(items * width);
    if (!pass && !scratch.commit()) return 1;
  }
  p.load(HeadRows{p.weight, 0, 0, 0, 0}, 0, weight);
#pragma omp parallel num_threads(p.threads)
  {
    FlushDenormals flush;
    float *x = tiles + thread_number() * 2 * width, *g = x + width;
#pragma omp for schedule(static)
    for (i64 item = 0; item < items; item++) {
      float* dweight = parts + item * width;
      memset(dweight, 0, width * sizeof(float));
      for (i64 row = item * ROWS_OF_ITEM; row < lesser((item + 1) * ROWS_OF_ITEM, p.M); row++) {
        p.load(p.x, row, x);
        p.load(p.dout, row, g);
        const float r = at<const float>(p.inverse)[row];
        vf dot = {};
        for (i64 j = 0; j < width; j += LANES) {
          vf normed = load(x + j) * r, dout = load(g + j), through = dout * load(weight + j);
          store(dweight + j, load(dweight + j) + dout * normed);
          dot += through * normed;
          store(x + j, normed);
          store(g + j, through);
        }
        const float mean = sum_of(dot) / (float)p.D;
        for (i64 j = 0; j < width; j += LANES) {
          vf normed = load(x + j);
          store(g + j, (load(g + j) - normed * mean) * r);
          store(x + j, normed * load(weight + j));
        }
        p.store(p.dx, row, g);
        p.store(p.out, row, x);
      }
    }
  }
  for (i64 item = 1; item < items; item++)
    for (i64 j = 0; j < width; j += LANES) store(parts + j, load(parts + j) + load(parts + item * width + j));
  memcpy(at<float>(p.dweight), parts, p.D * sizeof(float));
  return 0;
}
