// The core of VMamba's SS2D: x_proj, step size and scan along every route over a map, summed at each position.
//
// A route visits the positions in the order of a table, forwards or backwards. Between the phases, activations (x, the
// gradient of y, that of x) lie block by block in order of position: [B][block][L][LANES]. A tile of a route is
// gathered from there, in the route's order.

#pragma once

#include "products.h"

namespace {

struct Route {
  i64 order, backwards;  // positions, int32 [L]; 1 if they are visited from the last to the first
};
struct CrossWeights {  // each (K, ...), contiguous float32
  i64 x_proj, dt_proj, dt_bias, A, D;
};

struct CrossScan {
  i64 threads, B, E, L, N, R, K, chunk, round_weights;
  i64 routes;  // Route [K]
  Tensor x, out;
  i64 x_dbl, states;
  CrossWeights weights;
  // the rest is for the backward pass
  Tensor dout, dx;
  CrossWeights grads;

  i64 J() const { return R + 2 * N; }
  i64 columns() const { return ceil_div(K * J(), LANES) * LANES; }
  // of a row of x_dbl, the same on every CPU level; reading the last route's share in whole vectors stays inside
  i64 pitch() const { return ceil_div((K - 1) * J() + ceil_div(J(), 16) * 16, 16) * 16; }
  i64 tile_pitch() const { return ceil_div(J(), LANES) * LANES; }
  i64 dt_pitch() const { return ceil_div(R, LANES) * LANES; }
  i64 blocks() const { return ceil_div(E, LANES); }
  i64 tiles() const { return ceil_div(L, chunk); }
  i64 item(i64 k, i64 b, i64 block) const { return (k * B + b) * blocks() + block; }
  Route route(i64 k) const { return at<const Route>(routes)[k]; }
};

// One tile of a route: where it lies in the sequence, and which positions it visits, in ascending time.
struct Stretch {
  TileRange range;
  i64 T, backwards;
  const int32_t* position;
  Stretch(const CrossScan& p, i64 k, i64 number)
      : range(number, p.L, p.chunk, p.route(k).backwards), T(range.T), backwards(p.route(k).backwards),
        position(at<const int32_t>(p.route(k).order) + range.start) {}
};

void gather(const Stretch& s, const float* block, float* tile) {
  for (i64 t = 0; t < s.T; t++) store(tile + t * LANES, load(block + s.position[t] * LANES));
}
template <bool FIRST> void scatter_sum(const Stretch& s, const float* tile, float* block) {
  for (i64 t = 0; t < s.T; t++) {
    float* here = block + s.position[t] * LANES;
    store(here, FIRST ? load(tile + t * LANES) : load(here) + load(tile + t * LANES));
  }
}
// dt, B and C of one route, [T][tile_pitch]. What follows a row is not used.
void gather_rows(const CrossScan& p, const Stretch& s, i64 k, i64 b, float* tile) {
  const i64 pitch = p.pitch(), width = p.tile_pitch();
  const float* rows = at<const float>(p.x_dbl) + b * p.L * pitch + k * p.J();
  for (i64 t = 0; t < s.T; t++)
    for (i64 j = 0; j < width; j += LANES) store(tile + t * width + j, load(rows + s.position[t] * pitch + j));
}

void load_route(const CrossScan& p, i64 k, const Block& block, Kept& q) {
  const CrossWeights& w = p.weights;
  const i64 e = k * p.E + block.e;
  load_weights(w.A, e, block.lanes, p.N, LOG2E, false, q.A2);
  load_weights(w.dt_proj, e, block.lanes, p.R, 1.0f, p.round_weights, q.W);
  load_weights(w.D, e, block.lanes, 1, 1.0f, false, q.D);
  load_weights(w.dt_bias, e, block.lanes, 1, 1.0f, false, q.bias);
}

// ---- forward ------------------------------------------------------------------------------------------------------

// One block of x_proj of all routes, transposed: w[e][pitch], zeros past the last column and the last channel.
void pack_x_proj(const CrossScan& p, i64 block, float* w) {
  Block k(block, p.E, 1);
  float* rows = w + block * LANES * p.pitch();
  memset(rows, 0, LANES * p.pitch() * sizeof(float));
  transpose_copy(at<const float>(p.weights.x_proj) + k.e, p.E, p.K * p.J(), k.lanes, rows, p.pitch());
  if (p.round_weights)
    for (i64 i = 0; i < k.lanes * p.pitch(); i++) rows[i] = round_bf16(rows[i]);
}

// Tokens start to start + T: x into blocks, then dt, B and C of all routes.
void project_tokens(const CrossScan& p, i64 b, i64 start, i64 T, const float* w, float* x) {
  for (i64 block = 0; block < p.blocks(); block++) {
    Block k(block, p.E, 1);
    load_tile(p.x, b, k.e, k.lanes, start, T, x + ((b * p.blocks() + block) * p.L + start) * LANES);
  }
  float* out = at<float>(p.x_dbl) + (b * p.L + start) * p.pitch();
  for (i64 t = 0; t < T; t++)
    memset(out + t * p.pitch() + p.columns(), 0, (p.pitch() - p.columns()) * sizeof(float));
  multiply_tile(x + (b * p.blocks() * p.L + start) * LANES, p.L * LANES, p.blocks(), w, p.pitch(), p.columns(), T, out);
}

// All routes of one block, summed in y, [L][LANES].
void scan_block(const CrossScan& p, i64 b, i64 block, const float* x, float* y, float* tile_rows, const Walker& w) {
  Block channels(block, p.E, 1);
  Kept q(w.kept, p.N, p.R);
  for (i64 k = 0; k < p.K; k++) {
    load_route(p, k, channels, q);
    for (i64 n = 0; n < p.N; n++) w.h[n] = vf{};
    for (i64 i = 0; i < p.tiles(); i++) {
      Stretch s(p, k, i);
      if (p.states) memcpy(at<vf>(p.states) + (p.item(k, b, block) * p.tiles() + i) * p.N, w.h, p.N * sizeof(vf));
      gather(s, x, w.u);
      gather_rows(p, s, k, b, tile_rows);
      Rows rows{tile_rows, p.tile_pitch(), p.R, p.R + p.N};
      step_size_tile(rows, s.T, p.R, q.W, *q.bias, w.dt, nullptr);
      scan_tile<false>(Tile{p.N, s.T, s.backwards != 0, w.dt, w.u, rows, q.A2, *q.D}, w.h, w.y, nullptr, nullptr);
      k ? scatter_sum<false>(s, w.y, y) : scatter_sum<true>(s, w.y, y);
    }
  }
  store_tile(p.out, b, channels.e, channels.lanes, 0, p.L, y);
}

// ---- backward -----------------------------------------------------------------------------------------------------

// dt_proj of one route and block, [LANES][dt_pitch], zeros past the last column and the last channel.
void pack_dt_proj(const CrossScan& p, i64 k, i64 block, float* w) {
  Block channels(block, p.E, 1);
  const float* from = at<const float>(p.weights.dt_proj) + (k * p.E + channels.e) * p.R;
  memset(w, 0, LANES * p.dt_pitch() * sizeof(float));
  for (i64 lane = 0; lane < channels.lanes; lane++)
    for (i64 r = 0; r < p.R; r++) {
      float v = from[lane * p.R + r];
      w[lane * p.dt_pitch() + r] = p.round_weights ? round_bf16(v) : v;
    }
}

// dW[r] += sum_t ddt[t] raw[t][r] for columns r to r + H.
template <int H> void add_dt_proj_gradient(Rows rows, i64 T, const float* ddt, i64 r, vf* dW) {
  vf local[H];
  UNROLL for (int j = 0; j < H; j++) local[j] = dW[r + j];
  for (i64 t = 0; t < T; t++) {
    const float* raw = rows.row + t * rows.pitch + r;
    vf g = load(ddt + t * LANES);
    UNROLL for (int j = 0; j < H; j++) local[j] += g * raw[j];
  }
  UNROLL for (int j = 0; j < H; j++) dW[r + j] = local[j];
}

// One tile of one route of one block: adds to the gradient of x (but for x_proj's part), leaves that of the step size
// before its softplus in ddt and those of B and C per lane in w.lanes, [T][2N], which `first` starts.
void walk_block_back(const CrossScan& p, const Stretch& s, i64 k, i64 b, i64 block, i64 number, bool first,
                     const float* tile_rows, const float* x, const float* dy, float* dx, float* ddt, const Walker& w) {
  Kept q(w.kept, p.N, p.R);
  const Rows rows{tile_rows, p.tile_pitch(), p.R, p.R + p.N}, states{tile_rows + p.R, p.tile_pitch(), 0, p.N};
  gather(s, x, w.u);
  gather(s, dy, w.dy);
  step_size_tile(rows, s.T, p.R, q.W, *q.bias, w.dt, w.slope);
  memcpy(w.h, at<const vf>(p.states) + (p.item(k, b, block) * p.tiles() + number) * p.N, p.N * sizeof(vf));
  const Tile tile{p.N, s.T, s.backwards != 0, w.dt, w.u, states, q.A2, *q.D};
  scan_tile<true>(tile, w.h, w.y, w.decays, w.states);
  const TileBack back{w.dy, w.decays, w.states, q.g, q.dA, w.lanes, 2 * p.N, w.du, ddt};
  first ? walk_tile<true>(tile, back, q.dD) : walk_tile<false>(tile, back, q.dD);
  vf dbias = *q.dbias;
  for (i64 j = 0; j < s.T * LANES; j += LANES) {
    vf g = load(ddt + j) * load(w.slope + j);
    dbias += g;
    store(ddt + j, g);
  }
  *q.dbias = dbias;
  i64 r = 0;
  for (; r + 8 <= p.R; r += 8) add_dt_proj_gradient<8>(rows, s.T, ddt, r, q.dW);
  for (; r + 2 <= p.R; r += 2) add_dt_proj_gradient<2>(rows, s.T, ddt, r, q.dW);
  if (r < p.R) add_dt_proj_gradient<1>(rows, s.T, ddt, r, q.dW);
  k ? scatter_sum<false>(s, w.du, dx) : scatter_sum<true>(s, w.du, dx);
}

// What one thread needs beside a Walker: the rows of a tile, and what becomes their gradients.
struct Bench {
  float *tile_rows, *ddt, *dt_rows, *state_rows;
  Bench(Cutter& s, const CrossScan& p, i64 blocks) {
    tile_rows = s.take<float>(p.chunk * p.tile_pitch());
    ddt = s.take<float>(blocks * p.chunk * LANES);
    dt_rows = s.take<float>(p.chunk * p.dt_pitch());
    state_rows = s.take<float>(ceil_div(p.chunk * 2 * p.N, LANES) * LANES);
  }
};

// One tile of one route, blocks from to to: the gradients of its rows of x_dbl, summed over these channels.
void walk_tile_back(const CrossScan& p, i64 k, i64 b, i64 number, i64 from, i64 to, const float* dt_proj,
                    const float* x, const float* dy, float* dx, float* dx_dbl, const Bench& bench, const Walker& w) {
  const Stretch s(p, k, number);
  gather_rows(p, s, k, b, bench.tile_rows);
  for (i64 block = from; block < to; block++) {
    const i64 here = (b * p.blocks() + block) * p.L * LANES;
    walk_block_back(p, s, k, b, block, number, block == from, bench.tile_rows, x + here, dy + here, dx + here,
                    bench.ddt + (block - from) * p.chunk * LANES, w.of(block - from));
  }
  reduce_lanes(w.lanes, 1, ceil_div(s.T * 2 * p.N, LANES) * LANES, bench.state_rows);
  multiply_tile(bench.ddt, p.chunk * LANES, to - from, dt_proj + from * LANES * p.dt_pitch(), p.dt_pitch(),
                p.dt_pitch(), s.T, bench.dt_rows);
  for (i64 t = 0; t < s.T; t++) {
    float* row = dx_dbl + s.position[t] * p.pitch() + k * p.J();
    memcpy(row, bench.dt_rows + t * p.dt_pitch(), p.R * sizeof(float));
    memcpy(row + p.R, bench.state_rows + t * 2 * p.N, 2 * p.N * sizeof(float));
  }
}

}  // namespace

// Return 0, or 1 if memory ran out. states may be 0.
SSM_API int ssm_cross_selective_scan(const int64_t* arguments) {
  const CrossScan& p = *(const CrossScan*)arguments;
  const i64 blocks = p.blocks(), token_tiles = ceil_div(p.L, TOKEN_TILE);
  Scratch scratch;
  float *x, *w, *y;
  char *walkers, *end;
  for (int pass = 0; pass < 2; pass++) {
    x = scratch.take<float>(p.B * blocks * p.L * LANES);
    w = scratch.take<float>(blocks * LANES * p.pitch());
    y = scratch.take<float>(p.threads * p.L * LANES);
    walkers = scratch.take<char>(0);
    for (i64 i = 0; i < p.threads; i++) {
      Walker(scratch, p.N, p.R, p.chunk, 1, 1);
      Bench(scratch, p, 1);
    }
    end = scratch.take<char>(0);
    if (!pass && !scratch.commit()) return 1;
  }
#pragma omp parallel num_threads(p.threads)
  {
    FlushDenormals flush;
    Cutter mine{walkers + thread_number() * ((end - walkers) / p.threads)};
    const Walker walker(mine, p.N, p.R, p.chunk, 1, 1);
    const Bench bench(mine, p, 1);
#pragma omp for schedule(static)
    for (i64 i = 0; i < blocks; i++) pack_x_proj(p, i, w);
#pragma omp for schedule(dynamic)
    for (i64 i = 0; i < p.B * token_tiles; i++) {
      i64 start = i % token_tiles * TOKEN_TILE;
      project_tokens(p, i / token_tiles, start, lesser(TOKEN_TILE, p.L - start), w, x);
    }
#pragma omp for schedule(dynamic) nowait
    for (i64 i = 0; i < p.B * blocks; i++)
      scan_block(p, i / blocks, i % blocks, x + i * p.L * LANES, y + thread_number() * p.L * LANES, bench.tile_rows,
                 walker);
  }
  return 0;
}

// Return 0, or 1 if memory ran out.
SSM_API int ssm_cross_selective_scan_backward(const int64_t* arguments) {
  const CrossScan& p = *(const CrossScan*)arguments;
  const i64 blocks = p.blocks(), pitch = p.pitch(), record = record_size(p.N, p.R), columns = p.K * p.J();
  const i64 activation = p.B * blocks * p.L * LANES, dt_packed = blocks * LANES * p.dt_pitch();
  const i64 lane_columns = ceil_div(2 * p.N, LANES) * LANES;
  const Parts share(blocks, p.B);
  Scratch scratch;
  float *x, *dy, *dx, *dx_dbl, *dt_proj;
  vf *x_proj, *records, *dx_proj;
  char *walkers, *end;
  for (int pass = 0; pass < 2; pass++) {
    x = scratch.take<float>(activation);
    dy = scratch.take<float>(activation);
    dx = scratch.take<float>(activation);
    dx_dbl = scratch.take<float>(p.B * share.parts * p.L * pitch);
    dt_proj = scratch.take<float>(p.K * dt_packed);
    x_proj = scratch.take<vf>(blocks * columns);
    records = scratch.take<vf>(p.K * p.B * blocks * record);
    dx_proj = scratch.take<vf>(blocks * pitch);
    walkers = scratch.take<char>(0);
    for (i64 i = 0; i < p.threads; i++) {
      Walker(scratch, p.N, p.R, p.chunk, lane_columns, share.blocks_each);
      Bench(scratch, p, share.blocks_each);
    }
    end = scratch.take<char>(0);
    if (!pass && !scratch.commit()) return 1;
  }
#pragma omp parallel num_threads(p.threads)
  {
    FlushDenormals flush;
    Cutter mine{walkers + thread_number() * ((end - walkers) / p.threads)};
    const Walker walker(mine, p.N, p.R, p.chunk, lane_columns, share.blocks_each);
    const Bench bench(mine, p, share.blocks_each);
    for (i64 i = 0; i < p.chunk * lane_columns; i++) walker.lanes[i] = vf{};
#pragma omp for schedule(static)
    for (i64 block = 0; block < blocks; block++) {
      Block channels(block, p.E, 1);
      for (i64 j = 0; j < columns; j++)
        load_rows(at<const float>(p.weights.x_proj) + j * p.E + channels.e, channels.lanes, p.round_weights,
                  x_proj + block * columns + j);
      for (i64 k = 0; k < p.K; k++) pack_dt_proj(p, k, block, dt_proj + k * dt_packed + block * LANES * p.dt_pitch());
    }
#pragma omp for schedule(dynamic)
    for (i64 i = 0; i < p.B * blocks; i++) {
      Block channels(i % blocks, p.E, 1);
      load_tile(p.x, i / blocks, channels.e, channels.lanes, 0, p.L, x + i * p.L * LANES);
      load_tile(p.dout, i / blocks, channels.e, channels.lanes, 0, p.L, dy + i * p.L * LANES);
    }
#pragma omp for schedule(dynamic)
    for (i64 i = 0; i < p.B * share.parts; i++) {
      const i64 b = i / share.parts, from = i % share.parts * share.blocks_each;
      const i64 to = lesser(blocks, from + share.blocks_each);
      float* rows = dx_dbl + i * p.L * pitch;
      for (i64 t = 0; t < p.L; t++) memset(rows + t * pitch + columns, 0, (pitch - columns) * sizeof(float));
      for (i64 k = 0; k < p.K; k++) {
        for (i64 block = from; block < to; block++) {
          const Walker one = walker.of(block - from);
          for (i64 n = 0; n < one.kept_pitch; n++) one.kept[n] = vf{};
          Kept q(one.kept, p.N, p.R);
          load_route(p, k, Block(block, p.E, 1), q);
        }
        for (i64 tile = p.tiles() - 1; tile >= 0; tile--)
          walk_tile_back(p, k, b, tile, from, to, dt_proj + k * dt_packed, x, dy, dx, rows, bench, walker);
        for (i64 block = from; block < to; block++)
          memcpy(records + p.item(k, b, block) * record, walker.of(block - from).kept, record * sizeof(vf));
      }
    }
#pragma omp for schedule(static)
    for (i64 t = 0; t < p.B * p.L; t++) {  // the sum over the parts, in the first part's place
      float* sum = dx_dbl + (t / p.L * share.parts * p.L + t % p.L) * pitch;
      for (i64 part = 1; part < share.parts; part++)
        for (i64 j = 0; j < pitch; j += LANES) store(sum + j, load(sum + j) + load(sum + part * p.L * pitch + j));
    }
#pragma omp for schedule(dynamic) nowait
    for (i64 i = 0; i < p.B * blocks; i++) {
      Block channels(i % blocks, p.E, 1);
      const float* rows = dx_dbl + i / blocks * share.parts * p.L * pitch;
      const vf* w = x_proj + i % blocks * columns;
      float* grad = dx + i * p.L * LANES;
      i64 t = 0;
      for (; t + 8 <= p.L; t += 8) add_product<8>(rows + t * pitch, pitch, columns, w, grad + t * LANES);
      for (; t < p.L; t++) add_product<1>(rows + t * pitch, pitch, columns, w, grad + t * LANES);
      store_tile(p.dx, i / blocks, channels.e, channels.lanes, 0, p.L, grad);
    }
#pragma omp for schedule(dynamic) nowait
    for (i64 block = 0; block < blocks; block++) {
      Block channels(block, p.E, 1);
      vf* sum = dx_proj + block * pitch;
      for (i64 j = 0; j < pitch; j++) sum[j] = vf{};
      for (i64 b = 0; b < p.B; b++)
        add_weight_gradient(dx_dbl + b * share.parts * p.L * pitch, pitch, x + (b * blocks + block) * p.L * LANES, p.L,
                            sum);
      for (i64 j = 0; j < columns; j++)
        for (i64 lane = 0; lane < channels.lanes; lane++)
          at<float>(p.grads.x_proj)[j * p.E + channels.e + lane] = sum[j][lane];
    }
#pragma omp for schedule(static) nowait
    for (i64 i = 0; i < p.K * blocks; i++) {
      const i64 k = i / blocks, block = i % blocks;
      Block channels(block, p.E, 1);
      const i64 e = k * p.E + channels.e, lanes = channels.lanes, apart = blocks * record;
      Kept q(records + p.item(k, 0, block) * record, p.N, p.R);
      store_weights(q.dA, p.B, apart, e, lanes, p.N, p.grads.A);
      store_weights(q.dD, p.B, apart, e, lanes, 1, p.grads.D);
      store_weights(q.dbias, p.B, apart, e, lanes, 1, p.grads.dt_bias);
      store_weights(q.dW, p.B, apart, e, lanes, p.R, p.grads.dt_proj);
    }
  }
  return 0;
}
