// The core of Vim's mixer, channel-last: convolution, x_proj, step size, scan, gate, for one or both directions.
//
// Between its phases, activations of a direction (u and its gradient) lie block by block: [B][block][L][LANES].

#pragma once

#include "products.h"

namespace {

struct Direction {
  i64 conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D;
};

struct Bidirectional {
  i64 threads, B, E, L, N, R, K, directions, chunk, halve, round_weights;
  Tensor x, z, out;
  i64 x_dbl, states;
  Direction weights[2];
  // the rest is for the backward pass
  Tensor dout, dx, dz;
  Direction grads[2];

  i64 J() const { return R + 2 * N; }
  i64 pitch() const { return ceil_div(R + 2 * N, 16) * 16; }  // of rows of x_dbl, the same on every CPU level
  i64 blocks() const { return ceil_div(E, LANES); }
  i64 tiles() const { return ceil_div(L, chunk); }
  float scale() const { return halve && directions == 2 ? 0.5f : 1.0f; }
  Rows rows(i64 d, i64 b, i64 t) const {
    return Rows{at<const float>(x_dbl) + ((d * B + b) * L + t) * pitch(), pitch(), R, R + N};
  }
};

// ---- convolution --------------------------------------------------------------------------------------------------

// Tokens start - halo to start + T + halo of one block of x, zeros outside the sequence.
void load_haloed(const Tensor& x, i64 b, const Block& k, i64 L, i64 start, i64 T, i64 halo, float* tile) {
  i64 from = greater(0, start - halo), to = lesser(L, start + T + halo), before = from - (start - halo);
  memset(tile, 0, before * LANES * sizeof(float));
  load_tile(x, b, k.e, k.lanes, from, to - from, tile + before * LANES);
  memset(tile + (before + to - from) * LANES, 0, (T + 2 * halo - before - (to - from)) * LANES * sizeof(float));
}

// out_t = bias + sum_k taps[k] x_{t - (K - 1) + k}, mirrored in time when reverse. x points at token 0 of its halo.
inline vf convolve(const float* x, i64 K, const vf* taps, vf bias, bool reverse) {
  vf sum = bias;
  for (i64 k = 0; k < K; k++) sum += taps[k] * load(x + (reverse ? K - 1 - k : k - (K - 1)) * LANES);
  return sum;
}

struct ConvWeights {  // [direction][block][K + 1]: taps and bias
  const vf* w;
  i64 K, blocks;
  const vf* of(i64 d, i64 block) const { return w + (d * blocks + block) * (K + 1); }
};

// ---- forward ------------------------------------------------------------------------------------------------------

// One block of one direction's x_proj, transposed: w[e][pitch], zeros past J and past the last channel.
void pack_x_proj(const Bidirectional& p, i64 d, i64 block, float* w) {
  Block k(block, p.E, 1);
  float* rows = w + block * LANES * p.pitch();
  memset(rows, 0, LANES * p.pitch() * sizeof(float));
  transpose_copy(at<const float>(p.weights[d].x_proj) + k.e, p.E, p.J(), k.lanes, rows, p.pitch());
  if (p.round_weights)
    for (i64 i = 0; i < k.lanes * p.pitch(); i++) rows[i] = round_bf16(rows[i]);
}
void pack_conv(const Bidirectional& p, i64 d, i64 block, vf* w) {
  Block k(block, p.E, 1);
  w += (d * p.blocks() + block) * (p.K + 1);
  load_weights(p.weights[d].conv_weight, k.e, k.lanes, p.K, 1.0f, false, w);
  load_weights(p.weights[d].conv_bias, k.e, k.lanes, 1, 1.0f, false, w + p.K);
}

// u = silu(conv(x)) of T tokens, all blocks and directions. tile holds T + 2 (K - 1) rows.
void convolve_tokens(const Bidirectional& p, const ConvWeights& conv, i64 b, i64 block, i64 start, i64 T, float* tile,
                     float* u) {
  Block k(block, p.E, 1);
  load_haloed(p.x, b, k, p.L, start, T, p.K - 1, tile);
  const float* x = tile + (p.K - 1) * LANES;
  for (i64 d = 0; d < p.directions; d++) {
    const vf* w = conv.of(d, block);
    float* out = u + (((d * p.B + b) * p.blocks() + block) * p.L + start) * LANES;
    for (i64 t = 0; t < T; t++) {
      vf pre = p.K == 4 ? convolve(x + t * LANES, 4, w, w[4], d) : convolve(x + t * LANES, p.K, w, w[p.K], d);
      vf silu = pre * sigmoid(pre);
      if (p.x.is_bf16) {  // the projection reads u in xz's dtype
        bf16 rounded[LANES];
        store(rounded, silu);
        silu = load(rounded);
      }
      store(out + t * LANES, silu);
    }
  }
}

void project_tokens(const Bidirectional& p, i64 d, i64 b, i64 start, i64 T, const float* w, const float* u) {
  const float* x = u + ((d * p.B + b) * p.blocks() * p.L + start) * LANES;
  float* out = at<float>(p.x_dbl) + ((d * p.B + b) * p.L + start) * p.pitch();
  multiply_tile(x, p.L * LANES, p.blocks(), w, p.pitch(), p.pitch(), T, out);
}

void load_direction(const Bidirectional& p, i64 d, const Block& k, Kept& q) {
  load_weights(p.weights[d].A, k.e, k.lanes, p.N, LOG2E, false, q.A2);
  load_weights(p.weights[d].dt_proj, k.e, k.lanes, p.R, 1.0f, p.round_weights, q.W);
  load_weights(p.weights[d].D, k.e, k.lanes, 1, 1.0f, false, q.D);
  load_weights(p.weights[d].dt_bias, k.e, k.lanes, 1, 1.0f, false, q.bias);
}

// Both directions of one block: the first leaves its y in `first`, [L][LANES]; the last adds it and gates.
void scan_block(const Bidirectional& p, i64 b, i64 block, const float* u, float* first, const Walker& w) {
  Block k(block, p.E, 1);
  Kept q(w.kept, p.N, p.R);
  for (i64 d = 0; d < p.directions; d++) {
    load_direction(p, d, k, q);
    const i64 item = (d * p.B + b) * p.blocks() + block;
    for (i64 n = 0; n < p.N; n++) w.h[n] = vf{};
    for (i64 i = 0; i < p.tiles(); i++) {
      TileRange r(i, p.L, p.chunk, d);
      if (p.states) memcpy(at<vf>(p.states) + (item * p.tiles() + i) * p.N, w.h, p.N * sizeof(vf));
      Rows rows = p.rows(d, b, r.start);
      step_size_tile(rows, r.T, p.R, q.W, *q.bias, w.dt, nullptr);
      bool last = d == p.directions - 1;
      float* y = last ? w.y : first + r.start * LANES;
      Tile tile{p.N, r.T, d != 0, w.dt, u + (item * p.L + r.start) * LANES, rows, q.A2, *q.D};
      scan_tile<false>(tile, w.h, y, nullptr, nullptr);
      if (!last) continue;
      load_tile(p.z, b, k.e, k.lanes, r.start, r.T, w.z);
      for (i64 j = 0; j < r.T * LANES; j += LANES) {
        vf z = load(w.z + j), sum = load(y + j);
        if (d) sum += load(first + r.start * LANES + j);
        store(y + j, sum * z * sigmoid(z) * p.scale());
      }
      store_tile(p.out, b, k.e, k.lanes, r.start, r.T, y);
    }
  }
}

// ---- backward -----------------------------------------------------------------------------------------------------

// From the gradient of the step size before its softplus: those of columns i to i + H of x_dbl, per lane, and of W.
template <int H>
void step_size_back(Rows rows, i64 T, const float* ddt, i64 i, bool first, i64 columns, vf* lanes, Kept& q) {
  vf W[H], dW[H];
  UNROLL for (int j = 0; j < H; j++) W[j] = q.W[i + j], dW[j] = q.dW[i + j];
  for (i64 t = 0; t < T; t++) {
    const float* raw = rows.row + t * rows.pitch + i;
    vf g = load(ddt + t * LANES), *lane = lanes + t * columns + i;
    UNROLL for (int j = 0; j < H; j++) {
      lane[j] = first ? g * W[j] : lane[j] + g * W[j];
      dW[j] += g * raw[j];
    }
  }
  UNROLL for (int j = 0; j < H; j++) q.dW[i + j] = dW[j];
}

// One tile of one direction of one block; `first` marks the first block that writes this tile's lanes.
void walk_block_back(const Bidirectional& p, i64 d, i64 b, i64 block, const TileRange& r, i64 number, bool first,
                     i64 columns, const float* u, float* du, float* y_first, const Walker& w) {
  Block k(block, p.E, 1);
  Kept q(w.kept, p.N, p.R);
  const i64 item = (d * p.B + b) * p.blocks() + block, here = (item * p.L + r.start) * LANES;
  Rows rows = p.rows(d, b, r.start);
  step_size_tile(rows, r.T, p.R, q.W, *q.bias, w.dt, w.slope);
  memcpy(w.h, at<const vf>(p.states) + (item * p.tiles() + number) * p.N, p.N * sizeof(vf));
  const Tile tile{p.N, r.T, d != 0, w.dt, u + here, rows, q.A2, *q.D};
  scan_tile<true>(tile, w.h, w.y, w.decays, w.states);

  load_tile(p.z, b, k.e, k.lanes, r.start, r.T, w.z);
  load_tile(p.dout, b, k.e, k.lanes, r.start, r.T, w.dy);
  float* other = y_first + ((b * p.blocks() + block) * p.L + r.start) * LANES;
  const bool last = d == p.directions - 1;
  for (i64 j = 0; j < r.T * LANES; j += LANES) {
    vf z = load(w.z + j), s = sigmoid(z), dout = load(w.dy + j) * p.scale(), y = load(w.y + j);
    store(w.dy + j, dout * z * s);
    if (!last) {
      store(other + j, y);
      continue;
    }
    if (d) y += load(other + j);
    store(w.z + j, dout * y * s * (1.0f + z * (1.0f - s)));
  }
  if (last) store_tile(p.dz, b, k.e, k.lanes, r.start, r.T, w.z);

  const TileBack back{w.dy, w.decays, w.states, q.g, q.dA, w.lanes, columns, du + here, w.ddt};
  first ? walk_tile<true>(tile, back, q.dD) : walk_tile<false>(tile, back, q.dD);
  vf dbias = *q.dbias;
  for (i64 j = 0; j < r.T * LANES; j += LANES) {
    vf ddt = load(w.ddt + j) * load(w.slope + j);
    dbias += ddt;
    store(w.ddt + j, ddt);
  }
  *q.dbias = dbias;
  i64 i = 0;
  for (; i + 4 <= p.R; i += 4) step_size_back<4>(rows, r.T, w.ddt, i, first, columns, w.lanes, q);
  for (; i < p.R; i++) step_size_back<1>(rows, r.T, w.ddt, i, first, columns, w.lanes, q);
}

// From du of both directions: the gradients of x and of the convolutions of one block of one batch element.
// wide: directions + 2 buffers of L + 2 (K - 1) rows. records: [direction][K + 1], taps and bias.
void convolve_back(const Bidirectional& p, const ConvWeights& conv, i64 b, i64 block, const float* dx_dbl,
                   i64 columns, const vf* x_proj, float* du, float* wide, vf* records) {
  Block k(block, p.E, 1);
  const i64 halo = p.K - 1, size = (p.L + 2 * halo) * LANES;
  float *x = wide + halo * LANES, *dx = wide + size;
  load_haloed(p.x, b, k, p.L, 0, p.L, halo, wide);
  for (i64 d = 0; d < p.directions; d++) {
    const vf *w = conv.of(d, block), *rows = x_proj + (d * p.blocks() + block) * p.J();
    const float* dx_rows = dx_dbl + d * p.B * p.L * columns + b * p.L * columns;
    float* grad = du + ((d * p.B + b) * p.blocks() + block) * p.L * LANES;
    float* dpre = wide + (2 + d) * size + halo * LANES;
    vf* sums = records + d * (p.K + 1);
    memset(dpre - halo * LANES, 0, halo * LANES * sizeof(float));
    memset(dpre + p.L * LANES, 0, halo * LANES * sizeof(float));
    i64 t = 0;
    for (; t + 8 <= p.L; t += 8) add_product<8>(dx_rows + t * columns, columns, p.J(), rows, grad + t * LANES);
    for (; t < p.L; t++) add_product<1>(dx_rows + t * columns, columns, p.J(), rows, grad + t * LANES);
    for (i64 i = 0; i <= p.K; i++) sums[i] = vf{};
    for (t = 0; t < p.L; t++) {
      vf pre = convolve(x + t * LANES, p.K, w, w[p.K], d), s = sigmoid(pre);
      vf g = load(grad + t * LANES) * s * (1.0f + pre * (1.0f - s));
      store(dpre + t * LANES, g);
      for (i64 i = 0; i < p.K; i++) sums[i] += g * load(x + (t + (d ? halo - i : i - halo)) * LANES);
      sums[p.K] += g;
    }
    for (t = 0; t < p.L; t++) {
      vf sum = convolve(dpre + t * LANES, p.K, w, vf{}, !d);
      store(dx + t * LANES, d ? load(dx + t * LANES) + sum : sum);
    }
  }
  store_tile(p.dx, b, k.e, k.lanes, 0, p.L, dx);
}

}  // namespace

// Return 0, or 1 if memory ran out. states may be 0.
SSM_API int ssm_bidirectional_scan(const int64_t* arguments) {
  const Bidirectional& p = *(const Bidirectional*)arguments;
  const i64 blocks = p.blocks(), token_tiles = ceil_div(p.L, TOKEN_TILE), packed = blocks * LANES * p.pitch();
  const i64 tile_size = (TOKEN_TILE + 2 * (p.K - 1)) * LANES;
  Scratch scratch;
  float *u, *w, *halo, *first;
  vf* conv;
  char *walkers, *end;
  for (int pass = 0; pass < 2; pass++) {
    u = scratch.take<float>(p.directions * p.B * blocks * p.L * LANES);
    w = scratch.take<float>(p.directions * packed);
    conv = scratch.take<vf>(p.directions * blocks * (p.K + 1));
    halo = scratch.take<float>(p.threads * tile_size);
    first = scratch.take<float>(p.threads * p.L * LANES);
    walkers = scratch.take<char>(0);
    for (i64 i = 0; i < p.threads; i++) Walker(scratch, p.N, p.R, p.chunk, 1, 1);
    end = scratch.take<char>(0);
    if (!pass && !scratch.commit()) return 1;
  }
  const ConvWeights conv_weights{conv, p.K, blocks};
#pragma omp parallel num_threads(p.threads)
  {
    FlushDenormals flush;
    Cutter mine{walkers + thread_number() * ((end - walkers) / p.threads)};
    Walker walker(mine, p.N, p.R, p.chunk, 1, 1);
#pragma omp for schedule(static)
    for (i64 i = 0; i < p.directions * blocks; i++) {
      pack_x_proj(p, i / blocks, i % blocks, w + i / blocks * packed);
      pack_conv(p, i / blocks, i % blocks, conv);
    }
#pragma omp for schedule(dynamic)
    for (i64 i = 0; i < p.B * token_tiles; i++) {
      i64 b = i / token_tiles, start = i % token_tiles * TOKEN_TILE, T = lesser(TOKEN_TILE, p.L - start);
      for (i64 block = 0; block < blocks; block++)
        convolve_tokens(p, conv_weights, b, block, start, T, halo + thread_number() * tile_size, u);
      for (i64 d = 0; d < p.directions; d++) project_tokens(p, d, b, start, T, w + d * packed, u);
    }
#pragma omp for schedule(dynamic) nowait
    for (i64 i = 0; i < p.B * blocks; i++)
      scan_block(p, i / blocks, i % blocks, u, first + thread_number() * p.L * LANES, walker);
  }
  return 0;
}

// Return 0, or 1 if memory ran out.
SSM_API int ssm_bidirectional_scan_backward(const int64_t* arguments) {
  const Bidirectional& p = *(const Bidirectional*)arguments;
  const i64 blocks = p.blocks(), columns = ceil_div(p.J(), LANES) * LANES, record = record_size(p.N, p.R);
  const i64 activation = p.B * blocks * p.L * LANES, wide_size = (2 + p.directions) * (p.L + 2 * (p.K - 1)) * LANES;
  const i64 row_tiles = ceil_div(p.L, 32);
  const Parts share(blocks, p.B);
  const i64 partial_pitch = p.B * share.parts * p.L * columns;
  Scratch scratch;
  float *u, *du, *y_first, *partial, *dx_dbl, *wide;
  vf *conv, *x_proj, *records, *conv_records, *dx_proj;
  char *walkers, *end;
  for (int pass = 0; pass < 2; pass++) {
    u = scratch.take<float>(p.directions * activation);
    du = scratch.take<float>(p.directions * activation);
    y_first = scratch.take<float>((p.directions - 1) * activation);
    partial = scratch.take<float>(p.directions * partial_pitch);
    dx_dbl = scratch.take<float>(p.directions * p.B * p.L * columns);
    wide = scratch.take<float>(p.threads * wide_size);
    conv = scratch.take<vf>(p.directions * blocks * (p.K + 1));
    x_proj = scratch.take<vf>(p.directions * blocks * p.J());
    records = scratch.take<vf>(p.directions * p.B * blocks * record);
    conv_records = scratch.take<vf>(p.B * blocks * p.directions * (p.K + 1));
    dx_proj = scratch.take<vf>(p.directions * blocks * columns);
    walkers = scratch.take<char>(0);
    for (i64 i = 0; i < p.threads; i++) Walker(scratch, p.N, p.R, p.chunk, columns, share.blocks_each);
    end = scratch.take<char>(0);
    if (!pass && !scratch.commit()) return 1;
  }
  const ConvWeights conv_weights{conv, p.K, blocks};
#pragma omp parallel num_threads(p.threads)
  {
    FlushDenormals flush;
    Cutter cut{walkers + thread_number() * ((end - walkers) / p.threads)};
    Walker walker(cut, p.N, p.R, p.chunk, columns, share.blocks_each);
    for (i64 i = 0; i < p.chunk * columns; i++) walker.lanes[i] = vf{};
    float* mine = wide + thread_number() * wide_size;
#pragma omp for schedule(static)
    for (i64 i = 0; i < p.directions * blocks; i++) {
      i64 d = i / blocks, block = i % blocks;
      Block k(block, p.E, 1);
      pack_conv(p, d, block, conv);
      for (i64 j = 0; j < p.J(); j++)  // rows j of x_proj are contiguous in channels
        load_rows(at<const float>(p.weights[d].x_proj) + j * p.E + k.e, k.lanes, p.round_weights, x_proj + i * p.J() + j);
    }
#pragma omp for schedule(dynamic)
    for (i64 i = 0; i < p.B * blocks; i++)
      convolve_tokens(p, conv_weights, i / blocks, i % blocks, 0, p.L, mine, u);
#pragma omp for schedule(dynamic)
    for (i64 i = 0; i < p.B * share.parts; i++) {
      i64 b = i / share.parts, from = i % share.parts * share.blocks_each, to = lesser(blocks, from + share.blocks_each);
      for (i64 d = 0; d < p.directions; d++) {
        float* sums = partial + d * partial_pitch + i * p.L * columns;
        for (i64 block = from; block < to; block++) {
          Walker one = walker.of(block - from);
          for (i64 n = 0; n < one.kept_pitch; n++) one.kept[n] = vf{};
          Kept q(one.kept, p.N, p.R);
          load_direction(p, d, Block(block, p.E, 1), q);
        }
        for (i64 tile = p.tiles() - 1; tile >= 0; tile--) {
          TileRange r(tile, p.L, p.chunk, d);
          for (i64 block = from; block < to; block++)
            walk_block_back(p, d, b, block, r, tile, block == from, columns, u, du, y_first, walker.of(block - from));
          reduce_lanes(walker.lanes, r.T, columns, sums + r.start * columns);
        }
        for (i64 block = from; block < to; block++)
          memcpy(records + ((d * p.B + b) * blocks + block) * record, walker.of(block - from).kept, record * sizeof(vf));
      }
    }
#pragma omp for schedule(dynamic)
    for (i64 i = 0; i < p.directions * p.B * row_tiles; i++) {
      i64 db = i / row_tiles, from = i % row_tiles * 32 * columns, to = lesser(p.L * columns, from + 32 * columns);
      const float* parts = partial + db * share.parts * p.L * columns;
      float* sum = dx_dbl + db * p.L * columns;
      for (i64 j = from; j < to; j += LANES) {
        vf total = load(parts + j);
        for (i64 part = 1; part < share.parts; part++) total += load(parts + part * p.L * columns + j);
        store(sum + j, total);
      }
    }
#pragma omp for schedule(dynamic) nowait
    for (i64 i = 0; i < p.B * blocks; i++)
      convolve_back(p, conv_weights, i / blocks, i % blocks, dx_dbl, columns, x_proj, du, mine,
                    conv_records + i * p.directions * (p.K + 1));
#pragma omp for schedule(dynamic)
    for (i64 i = 0; i < p.directions * blocks; i++) {
      i64 d = i / blocks, block = i % blocks;
      vf* sum = dx_proj + i * columns;
      for (i64 j = 0; j < columns; j++) sum[j] = vf{};
      for (i64 b = 0; b < p.B; b++)
        add_weight_gradient(dx_dbl + (d * p.B + b) * p.L * columns, columns,
                            u + ((d * p.B + b) * blocks + block) * p.L * LANES, p.L, sum);
      Block k(block, p.E, 1);
      for (i64 j = 0; j < p.J(); j++)
        for (i64 lane = 0; lane < k.lanes; lane++) at<float>(p.grads[d].x_proj)[j * p.E + k.e + lane] = sum[j][lane];
    }
#pragma omp for schedule(static) nowait
    for (i64 i = 0; i < p.directions * blocks; i++) {
      i64 d = i / blocks, block = i % blocks, K = p.K + 1;
      Block k(block, p.E, 1);
      const Direction& g = p.grads[d];
      Kept q(records + (d * p.B * blocks + block) * record, p.N, p.R);
      store_weights(q.dA, p.B, blocks * record, k.e, k.lanes, p.N, g.A);
      store_weights(q.dD, p.B, blocks * record, k.e, k.lanes, 1, g.D);
      store_weights(q.dbias, p.B, blocks * record, k.e, k.lanes, 1, g.dt_bias);
      store_weights(q.dW, p.B, blocks * record, k.e, k.lanes, p.R, g.dt_proj);
      const vf* c = conv_records + (block * p.directions + d) * K;
      store_weights(c, p.B, blocks * p.directions * K, k.e, k.lanes, p.K, g.conv_weight);
      store_weights(c + p.K, p.B, blocks * p.directions * K, k.e, k.lanes, 1, g.conv_bias);
    }
  }
  return 0;
}
