// Depthwise convolution over tokens with its SiLU, in one direction or both, forward and backward, for any strides.
//
// A direction reads the tokens from `before` tokens back: y_t = act(bias + sum_w taps[w] x_{t - before + w}).

#pragma once

#include "scan.h"

namespace {

constexpr i64 CONV_SPAN = 64, CONV_CHANNELS = 64;  // tokens and channels of a work item: its rows stay in the L1 cache
constexpr i64 CONV_ROWS = 4;                       // tokens whose sums are made side by side

struct Convolution {
  i64 threads, B, E, L, W, directions, reverse, centred, silu;
  Tensor x;
  i64 weight, bias;  // (K, E, W) and (K, E), float32; bias 0 if absent
  Tensor out;        // of direction 0: y, or the gradient of y for the backward pass
  i64 out_k;         // bytes to the other direction
  Tensor dx;
  i64 dweight, dbias;

  i64 halo() const { return W - 1; }
  i64 spans() const { return ceil_div(L, CONV_SPAN); }
  i64 tiles() const { return ceil_div(E, CONV_CHANNELS); }
  i64 blocks() const { return ceil_div(E, LANES); }
  bool mirrored(i64 d) const { return d == 1 || reverse; }
  i64 before(i64 d) const { return mirrored(d) ? 0 : centred ? W / 2 : W - 1; }
  Tensor out_of(i64 d) const {
    Tensor one = out;
    one.address += d * out_k;
    return one;
  }
};

// Taps and bias of a block of channels, per direction: [direction][W + 1]
void load_taps(const Convolution& p, const Block& k, vf* taps) {
  for (i64 d = 0; d < p.directions; d++, taps += p.W + 1) {
    const float* w = at<const float>(p.weight) + (d * p.E + k.e) * p.W;
    for (i64 i = 0; i <= p.W; i++) taps[i] = vf{};
    for (i64 lane = 0; lane < k.lanes; lane++) {
      for (i64 i = 0; i < p.W; i++) taps[p.mirrored(d) ? p.W - 1 - i : i][lane] = w[lane * p.W + i];
      if (p.bias) taps[p.W][lane] = at<const float>(p.bias)[d * p.E + k.e + lane];
    }
  }
}

// Tokens from to from + count of a block of channels, zeros outside the sequence.
void load_tokens(const Tensor& x, i64 b, const Block& k, i64 L, i64 from, i64 count, float* tile) {
  const i64 first = greater(0, from), end = greater(first, lesser(L, from + count));
  memset(tile, 0, (first - from) * LANES * sizeof(float));
  load_tile(x, b, k.e, k.lanes, first, end - first, tile + (first - from) * LANES);
  memset(tile + (end - from) * LANES, 0, (from + count - end) * LANES * sizeof(float));
}

// finish(i, start + sum_w taps[w] x[i + w step]) for every i below count
template <class F> void correlate(const float* x, i64 step, i64 count, const vf* taps, i64 W, vf start, F finish) {
  i64 i = 0;
  for (; i + CONV_ROWS <= count; i += CONV_ROWS) {
    vf sum[CONV_ROWS];
    UNROLL for (int r = 0; r < CONV_ROWS; r++) sum[r] = start;
    for (i64 w = 0; w < W; w++)
      UNROLL for (int r = 0; r < CONV_ROWS; r++) sum[r] += taps[w] * load(x + (i + r + w * step) * LANES);
    UNROLL for (int r = 0; r < CONV_ROWS; r++) finish(i + r, sum[r]);
  }
  for (; i < count; i++) {
    vf sum = start;
    for (i64 w = 0; w < W; w++) sum += taps[w] * load(x + (i + w * step) * LANES);
    finish(i, sum);
  }
}

// The sum of a[i] b[i], of a alone without b, over T rows.
vf sum_products(const float* a, const float* b, i64 T) {
  vf sum[CONV_ROWS] = {};
  i64 i = 0;
  const auto one = [&](i64 at) { return b ? load(a + at * LANES) * load(b + at * LANES) : load(a + at * LANES); };
  for (; i + CONV_ROWS <= T; i += CONV_ROWS) UNROLL for (int r = 0; r < CONV_ROWS; r++) sum[r] += one(i + r);
  for (; i < T; i++) sum[0] += one(i);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

struct ConvSpan {  // a work item
  i64 tile, b, start, T, row;
  ConvSpan(const Convolution& p, i64 i) {
    tile = i % p.tiles(), row = i / p.tiles();
    b = row / p.spans(), start = row % p.spans() * CONV_SPAN, T = lesser(CONV_SPAN, p.L - start);
  }
  template <class F> void for_each_block(const Convolution& p, F f) const {
    const i64 end = lesser(p.E, (tile + 1) * CONV_CHANNELS);
    for (i64 e = tile * CONV_CHANNELS; e < end; e += LANES) f(Block(e / LANES, p.E, 1));
  }
};

struct ConvBuffers {  // of one thread
  float *x, *y, *g, *dx;
  vf* taps;
  ConvBuffers(Cutter& s, const Convolution& p) {
    float** tiles[] = {&x, &y, &g, &dx};
    for (float** tile : tiles) *tile = s.take<float>((CONV_SPAN + 2 * p.halo()) * LANES);
    taps = s.take<vf>(p.directions * (p.W + 1));
  }
};

void convolve_span(const Convolution& p, const ConvSpan& s, const ConvBuffers& w) {
  s.for_each_block(p, [&](const Block& k) {
    load_taps(p, k, w.taps);
    load_tokens(p.x, s.b, k, p.L, s.start - p.halo(), s.T + 2 * p.halo(), w.x);
    for (i64 d = 0; d < p.directions; d++) {
      const vf* taps = w.taps + d * (p.W + 1);
      const float* first = w.x + (p.halo() - p.before(d)) * LANES;
      if (p.silu)
        correlate(first, 1, s.T, taps, p.W, taps[p.W], [&](i64 i, vf y) { store(w.y + i * LANES, y * sigmoid(y)); });
      else correlate(first, 1, s.T, taps, p.W, taps[p.W], [&](i64 i, vf y) { store(w.y + i * LANES, y); });
      store_tile(p.out_of(d), s.b, k.e, k.lanes, s.start, s.T, w.y);
    }
  });
}

// Writes dx and, for this span, the gradients of taps and bias: records[direction][W + 1][block].
void convolve_span_back(const Convolution& p, const ConvSpan& s, const ConvBuffers& w, vf* records) {
  const i64 halo = p.halo();
  s.for_each_block(p, [&](const Block& k) {
    load_taps(p, k, w.taps);
    load_tokens(p.x, s.b, k, p.L, s.start - halo, s.T + 2 * halo, w.x);
    for (i64 d = 0; d < p.directions; d++) {
      const vf* taps = w.taps + d * (p.W + 1);
      // row i of g belongs to token start - halo + before + i, whose taps meet rows i to i + halo of x
      load_tokens(p.out_of(d), s.b, k, p.L, s.start - halo + p.before(d), s.T + halo, w.g);
      if (p.silu)
        correlate(w.x, 1, s.T + halo, taps, p.W, taps[p.W], [&](i64 i, vf pre) {
          vf q = sigmoid(pre);
          store(w.g + i * LANES, load(w.g + i * LANES) * q * (1.0f + pre * (1.0f - q)));
        });
      correlate(w.g + halo * LANES, -1, s.T, taps, p.W, vf{}, [&](i64 i, vf sum) {
        store(w.dx + i * LANES, d ? load(w.dx + i * LANES) + sum : sum);
      });
      const i64 own = halo - p.before(d);  // the first row of g whose token is in the span
      vf* record = records + d * (p.W + 1) * p.blocks() + k.e / LANES;
      for (i64 i = 0; i < p.W; i++)
        record[i * p.blocks()] = sum_products(w.g + own * LANES, w.x + (own + i) * LANES, s.T);
      record[p.W * p.blocks()] = sum_products(w.g + own * LANES, nullptr, s.T);
    }
    store_tile(p.dx, s.b, k.e, k.lanes, s.start, s.T, w.dx);
  });
}

}  // namespace

// Return 0, or 1 if memory ran out.
SSM_API int ssm_causal_conv1d(const int64_t* arguments) {
  const Convolution& p = *(const Convolution*)arguments;
  Scratch scratch;
  char *buffers, *end;
  for (int pass = 0; pass < 2; pass++) {
    buffers = scratch.take<char>(0);
    for (i64 i = 0; i < p.threads; i++) ConvBuffers(scratch, p);
    end = scratch.take<char>(0);
    if (!pass && !scratch.commit()) return 1;
  }
#pragma omp parallel num_threads(p.threads)
  {
    FlushDenormals flush;
    Cutter mine{buffers + thread_number() * ((end - buffers) / p.threads)};
    const ConvBuffers w(mine, p);
#pragma omp for schedule(static) nowait
    for (i64 i = 0; i < p.B * p.spans() * p.tiles(); i++) convolve_span(p, ConvSpan(p, i), w);
  }
  return 0;
}

// Return 0, or 1 if memory ran out.
SSM_API int ssm_causal_conv1d_backward(const int64_t* arguments) {
  const Convolution& p = *(const Convolution*)arguments;
  const i64 rows = p.B * p.spans(), record = p.directions * (p.W + 1) * p.blocks();
  Scratch scratch;
  char *buffers, *end;
  vf* records;
  for (int pass = 0; pass < 2; pass++) {
    buffers = scratch.take<char>(0);
    for (i64 i = 0; i < p.threads; i++) ConvBuffers(scratch, p);
    end = scratch.take<char>(0);
    records = scratch.take<vf>(rows * record);
    if (!pass && !scratch.commit()) return 1;
  }
#pragma omp parallel num_threads(p.threads)
  {
    FlushDenormals flush;
    Cutter mine{buffers + thread_number() * ((end - buffers) / p.threads)};
    const ConvBuffers w(mine, p);
#pragma omp for schedule(static)
    for (i64 i = 0; i < rows * p.tiles(); i++) {
      const ConvSpan span(p, i);
      convolve_span_back(p, span, w, records + span.row * record);
    }
#pragma omp for schedule(static) nowait
    for (i64 i = 0; i < record; i++) {
      vf sum = {};
      for (i64 row = 0; row < rows; row++) sum += records[row * record + i];
      const Block k(i % p.blocks(), p.E, 1);
      const i64 d = i / p.blocks() / (p.W + 1), tap = i / p.blocks() % (p.W + 1);
      for (i64 lane = 0; lane < k.lanes; lane++) {
        const i64 channel = d * p.E + k.e + lane;
        if (tap < p.W) at<float>(p.dweight)[channel * p.W + (p.mirrored(d) ? p.W - 1 - tap : tap)] = sum[lane];
        else if (p.dbias) at<float>(p.dbias)[channel] = sum[lane];
      }
    }
  }
  return 0;
}
