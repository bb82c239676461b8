// The gated norm: out = h r weight with h = x silu(z) and r = 1 / sqrt(mean(h^2) + eps), over each group of channels.
//
// B batch, L tokens, D channels. A row is one token as float32, each group of channels padded to whole vectors with zeros.

#pragma once

#include "tiles.h"

namespace {
namespace gated {

constexpr i64 ROWS_OF_ITEM = 64;  // tokens whose parts of the weight's gradient are summed first

struct GatedNorm {
  i64 threads, B, L, D, groups, eps_bits;
  HeadRows x, z, out;
  i64 weight;
  // the rest is for the backward pass
  HeadRows dout, dx, dz;
  i64 dweight;

  i64 size() const { return D / groups; }
  i64 width() const { return (ceil_div(size(), 16) * 16) * groups; }  // every group on whole vectors
  i64 items() const { return ceil_div(B * L, ROWS_OF_ITEM); }
  float eps() const { return as_float(eps_bits); }
};

// One row of a tensor as groups of whole vectors.
void load_groups(const GatedNorm& p, const HeadRows& rows, i64 row, float* tile) {
  const i64 pitch = p.width() / p.groups;
  HeadRows by_group = rows;
  by_group.stride_h = p.size();
  for (i64 g = 0; g < p.groups; g++) load_row_tile(by_group, row / p.L, g, row % p.L, 1, p.size(), tile + g * pitch, pitch);
}
void store_groups(const GatedNorm& p, const HeadRows& rows, i64 row, const float* tile) {
  const i64 pitch = p.width() / p.groups;
  HeadRows by_group = rows;
  by_group.stride_h = p.size();
  for (i64 g = 0; g < p.groups; g++)
    store_row_tile(by_group, row / p.L, g, row % p.L, 1, p.size(), tile + g * pitch, pitch);
}
void load_weight(const GatedNorm& p, float* tile) {
  HeadRows weight{p.weight, 0, 0, 0, 0};
  load_groups(p, weight, 0, tile);
}
// h = x silu(z) of one group; returns 1 / deviation.
inline float gate(const GatedNorm& p, const float* x, const float* z, i64 pitch, float* h) {
  vf squares = {};
  for (i64 j = 0; j < pitch; j += LANES) {
    vf gate = load(z + j), gated = load(x + j) * gate * sigmoid(gate);
    squares += gated * gated;
    store(h + j, gated);
  }
  return 1.0f / __builtin_sqrtf(sum_of(squares) / (float)p.size() + p.eps());
}

}  // namespace gated
}  // namespace

// Return 0, or 1 if memory ran out.
SSM_API int ssm_gated_norm(const int64_t* arguments) {
  using namespace gated;
  const GatedNorm& p = *(const GatedNorm*)arguments;
  const i64 width = p.width(), pitch = width / p.groups;
  Scratch scratch;
  float *weight, *tiles;
  for (int pass = 0; pass < 2; pass++) {
    weight = scratch.take<float>(width);
    tiles = scratch.take<float>(p.threads * 2 * width);
    if (!pass && !scratch.commit()) return 1;
  }
  load_weight(p, weight);
#pragma omp parallel num_threads(p.threads)
  {
    FlushDenormals flush;
    float *x = tiles + thread_number() * 2 * width, *z = x + width;
#pragma omp for schedule(static)
    for (i64 row = 0; row < p.B * p.L; row++) {
      load_groups(p, p.x, row, x);
      load_groups(p, p.z, row, z);
      for (i64 g = 0; g < width; g += pitch) {
        const float r = gate(p, x + g, z + g, pitch, x + g);
        for (i64 j = g; j < g + pitch; j += LANES) store(x + j, load(x + j) * r * load(weight + j));
      }
      store_groups(p, p.out, row, x);
    }
  }
  return 0;
}

// Return 0, or 1 if memory ran out.
SSM_API int ssm_gated_norm_backward(const int64_t* arguments) {
  using namespace gated;
  const GatedNorm& p = *(const GatedNorm*)arguments;
  const i64 width = p.width(), pitch = width / p.groups, items = p.items();
  Scratch scratch;
  float *weight, *tiles, *parts;
  for (int pass = 0; pass < 2; pass++) {
    weight = scratch.take<float>(width);
    tiles = scratch.take<float>(p.threads * 4 * width);
    parts = scratch.take<float>(items * width);
    if (!pass && !scratch.commit()) return 1;
  }
  load_weight(p, weight);
#pragma omp parallel num_threads(p.threads)
  {
    FlushDenormals flush;
    float *x = tiles + thread_number() * 4 * width, *z = x + width, *h = z + width, *g = h + width;
#pragma omp for schedule(static)
    for (i64 item = 0; item < items; item++) {
      float* dweight = parts + item * width;
      memset(dweight, 0, width * sizeof(float));
      for (i64 row = item * ROWS_OF_ITEM; row < lesser((item + 1) * ROWS_OF_ITEM, p.B * p.L); row++) {
        load_groups(p, p.x, row, x);
        load_groups(p, p.z, row, z);
        load_groups(p, p.dout, row, g);
        for (i64 first = 0; first < width; first += pitch) {
          const float r = gate(p, x + first, z + first, pitch, h + first);
          vf dot = {};
          for (i64 j = first; j < first + pitch; j += LANES) {
            vf normed = load(h + j) * r, dout = load(g + j), through = dout * load(weight + j);
            store(dweight + j, load(dweight + j) + dout * normed);
            dot += through * normed;
            store(h + j, normed);
            store(g + j, through);
          }
          const float mean = sum_of(dot) / (float)p.size();
          for (i64 j = first; j < first + pitch; j += LANES) {
            vf dh = (load(g + j) - load(h + j) * mean) * r, gate = load(z + j), s = sigmoid(gate);
            store(z + j, dh * load(x + j) * s * (1.0f + gate * (1.0f - s)));
            store(x + j, dh * gate * s);
          }
        }
        store_groups(p, p.dx, row, x);
        store_groups(p, p.dz, row, z);
      }
    }
  }
  for (i64 item = 1; item < items; item++)
    for (i64 j = 0; j < width; j += LANES) store(parts + j, load(parts + j) + load(parts + item * width + j));
  for (i64 g = 0; g < p.groups; g++)
    memcpy(at<float>(p.dweight) + g * p.size(), parts + g * pitch, p.size() * sizeof(float));
  return 0;
}
