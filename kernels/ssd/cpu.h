// The SSD, one or two directions, as matrix products over chunks of tokens.
//
// B batch, L tokens, H heads, P channels of a head, G groups of heads, N state, Q tokens of a chunk, K chunks,
// T tokens of the present chunk. Widths of tiles are multiples of 16: P, N and Q rounded up.
//
// With S, the running sum of the logarithms of decays (base 2, double precision, from the start of the chunk), token t
// reads token s through G_ts W_ts, where G = C B^T belongs to a group and W = 2^(S_t - S_s) dt_s to a head. S includes
// the step at t in the forward direction, and stops before it in the backward direction, which has the signs changed.
// In blocks of 16 x 16 beside the diagonal, W is a product of two powers, both of sums over whole steps: none overflows.
//
// Work items and the order of every sum depend on the sizes alone, so results do not depend on the number of threads.

#pragma once

#include "tiles.h"

namespace {
namespace duality {  // all operations are compiled together

constexpr i64 SUB = 16;         // side of the blocks of W
constexpr i64 ROW_BLOCK = 48;   // rows of W that are in the cache at a time
constexpr float LEAST = -100.0f * LOG2E;  // of the logarithm of one step's decay: MIN_LOG_DECAY
constexpr float FORGETS = -24.0f;  // a decay below 2^FORGETS has less gradient than the rounding of a difference of sums

struct Steps {  // of one direction; address 0 if there is none
  i64 dt, stride_b, stride_l, stride_h, A;
};

struct SSD {
  i64 threads, B, L, H, P, G, N, Q, scale_bits;
  HeadRows x, left, right, y;  // left is B, right is C
  i64 D;
  Steps steps[2];
  i64 states;  // (directions, B, H, K, N, width of P): entering each chunk; 0 for one chunk
  // the rest is for the backward pass
  HeadRows dy, dx, dleft, dright;
  i64 dD, ddt[2], dA[2];  // ddt (B, L, H)

  i64 K() const { return ceil_div(L, Q); }
  i64 width(i64 n) const { return ceil_div(n, 16) * 16; }
  i64 heads() const { return H / G; }  // of a group
  i64 parts() const { return lesser(heads(), ceil_div(WORK_ITEMS, B * G * K())); }
  i64 part_start(i64 g, i64 part) const { return g * heads() + part * heads() / parts(); }
  bool has(int d) const { return steps[d].dt != 0; }
  i64 slot(int d) const { return d && has(0) ? 1 : 0; }  // of a direction in `states`
  i64 directions() const { return has(0) + has(1); }
  float scale() const { return as_float(scale_bits); }
  i64 state_size() const { return N * width(P); }
  i64 state_at(int d, i64 b, i64 h, i64 k) const { return (((slot(d) * B + b) * H + h) * K() + k) * state_size(); }
};

// Step sizes of all heads and chunks side by side, and the running sums of logarithms of decays: filled once, read often.
struct Clocks {
  float* dt;
  double *sum, *total;

  Clocks(Cutter& memory, const SSD& p) {
    dt = memory.take<float>(2 * p.B * p.H * p.K() * p.width(p.Q));
    sum = memory.take<double>(2 * p.B * p.H * p.K() * p.width(p.Q));
    total = memory.take<double>(2 * p.B * p.H * p.K());
  }
  static i64 place(const SSD& p, int d, i64 b, i64 h, i64 k) { return ((d * p.B + b) * p.H + h) * p.K() + k; }
  void fill(const SSD& p, int d, i64 b, i64 h, i64 k) const {
    const i64 here = place(p, d, b, h, k), width = p.width(p.Q), start = k * p.Q, T = lesser(p.Q, p.L - start);
    float* steps = dt + here * width;
    double *sums = sum + here * width, run = 0;
    const Steps& s = p.steps[d];
    const float* step = at<const float>(s.dt) + b * s.stride_b + h * s.stride_h + start * s.stride_l;
    const float A2 = p.has(d) ? at<const float>(s.A)[h] * LOG2E : 0.0f;
    for (i64 t = 0; t < width; t++) {
      steps[t] = p.has(d) && t < T ? step[t * s.stride_l] : 0.0f;
      const float log_decay = steps[t] * A2, least = log_decay < LEAST ? LEAST : log_decay;
      sums[t] = d ? run : run + least;
      run += least;
    }
    total[here] = run;
  }
};

// The clocks of one head in one chunk, padded to a multiple of 16.
struct Clock {
  const float* dt[2];
  const double* sum[2];
  double total[2];

  void read(const SSD& p, const Clocks& clocks, i64 b, i64 h, i64 k) {
    for (int d = 0; d < 2; d++) {
      const i64 here = Clocks::place(p, d, b, h, k);
      dt[d] = clocks.dt + here * p.width(p.Q);
      sum[d] = clocks.sum + here * p.width(p.Q);
      total[d] = clocks.total[here];
    }
  }
  // out[i] = 2^(sign (sum[first + i] - reference)) for a multiple of 16
  void powers(int d, i64 first, i64 count, double reference, double sign, float* out) const {
    const double* s = sum[d] + first;
    for (i64 i = 0; i < count; i++) out[i] = (float)(sign * (s[i] - reference));
    for (i64 i = 0; i < count; i += LANES) store(out + i, exp2v(load(out + i)));
  }
  // The decay between each token and the edge of the chunk that its state leaves by (true) or enters by.
  void to_edge(int d, bool leaves, i64 padded, float* out) const {
    if (leaves) d ? powers(d, 0, padded, 0.0, 1.0, out) : powers(d, 0, padded, total[d], -1.0, out);
    else d ? powers(d, 0, padded, total[d], -1.0, out) : powers(d, 0, padded, 0.0, 1.0, out);
  }
};

// W without step sizes for the SUB rows from `first` on: rows[i] column[s] left and right of the diagonal block, which
// is itself in block[direction][i][s]. There the diagonal is 0: its decay is 1, and its gradient would only cancel.
struct Weights {
  float *column, *column_dt, rows[2][SUB], block[2][SUB * SUB];

  Weights(Cutter& memory, i64 width) { column = memory.take<float>(width), column_dt = memory.take<float>(width); }

  void read(const SSD& p, const Clock& clock, i64 first, i64 padded) {
    const i64 end = first + SUB;
    if (p.has(0)) {
      const double reference = first ? clock.sum[0][first - 1] : 0.0;
      clock.powers(0, 0, first, reference, -1.0, column);
      clock.powers(0, first, SUB, reference, 1.0, rows[0]);
    } else {
      memset(column, 0, first * sizeof(float));
      memset(rows[0], 0, sizeof rows[0]);
    }
    if (p.has(1) && end < padded) {
      clock.powers(1, end, padded - end, clock.sum[1][end], 1.0, column + end);
      clock.powers(1, first, SUB, clock.sum[1][end], -1.0, rows[1]);
    } else {
      memset(column + end, 0, (padded - end) * sizeof(float));
      memset(rows[1], 0, sizeof rows[1]);
    }
    for (i64 s = 0; s < padded; s += LANES)
      store(column_dt + s, load(column + s) * load(clock.dt[s < first ? 0 : 1] + s));
    for (int d = 0; d < 2; d++) {
      float* out = block[d];
      if (!p.has(d)) {
        memset(out, 0, sizeof block[d]);
        continue;
      }
      const double *s = clock.sum[d] + first, sign = d ? -1.0 : 1.0;
      for (i64 i = 0; i < SUB; i++)
        for (i64 j = 0; j < SUB; j++) out[i * SUB + j] = (d ? j <= i : j >= i) ? 0.0f : (float)(sign * (s[i] - s[j]));
      for (i64 i = 0; i < SUB * SUB; i += LANES) store(out + i, exp2v(load(out + i)));
      for (i64 i = 0; i < SUB; i++)
        for (i64 j = 0; j < SUB; j++)
          if (d ? j <= i : j >= i) out[i * SUB + j] = 0.0f;
    }
  }
};

// Tokens [low, high) that some of the rows [first, first + R) read.
struct Reach {
  i64 low, high;
  Reach(const SSD& p, i64 first, i64 R, i64 T) : low(p.has(0) ? 0 : first), high(p.has(1) ? T : first + R) {}
};

struct Item {  // heads [from, to) of one group in one chunk of one batch element
  i64 b, g, k, part, start, T, padded, from, to;
  Item(const SSD& p, i64 i) {
    part = i % p.parts(), i /= p.parts();
    k = i % p.K(), i /= p.K();
    g = i % p.G, b = i / p.G;
    start = k * p.Q, T = lesser(p.Q, p.L - start), padded = ceil_div(T, 16) * 16;
    from = p.part_start(g, part), to = p.part_start(g, part + 1);
  }
  static i64 count(const SSD& p) { return p.B * p.G * p.K() * p.parts(); }
};

// tile[t][..] times factor[t] (and factor2[t]), into out.
void scale_rows(const float* tile, i64 T, i64 pitch, const float* factor, const float* factor2, float* out) {
  for (i64 t = 0; t < T; t++) {
    const float f = factor2 ? factor[t] * factor2[t] : factor[t];
    for (i64 j = 0; j < pitch; j += LANES) store(out + t * pitch + j, f * load(tile + t * pitch + j));
  }
}

// What both passes need of one group in one chunk: B, C, and G = C B^T.
struct Group {
  float *left, *right, *left_columns, *products;
  Group(Cutter& memory, const SSD& p) {
    const i64 N = p.width(p.N), Q = p.width(p.Q);
    left = memory.take<float>(Q * N), right = memory.take<float>(Q * N);
    left_columns = memory.take<float>(N * Q), products = memory.take<float>(Q * Q);
  }
  void read(const SSD& p, const Item& item) {
    const i64 N = p.width(p.N), Q = item.padded;
    load_row_tile(p.left, item.b, item.g, item.start, item.T, p.N, left, N);
    load_row_tile(p.right, item.b, item.g, item.start, item.T, p.N, right, N);
    for (i64 n = 0; n < p.N; n++) memset(left_columns + n * Q, 0, Q * sizeof(float));
    transpose_copy(left, N, item.T, p.N, left_columns, Q);
    product<false>(item.T, Q, p.N, right, N, 1, left_columns, Q, products, Q);
  }
};

// ---- states -------------------------------------------------------------------------------------------------------

// The state that each chunk leaves when none enters it, for the heads of an item.
struct StateWorker {
  Clock clock;
  float *rows, *edge, *scaled, *x;
  StateWorker(Cutter& memory, const SSD& p) {
    rows = memory.take<float>(p.width(p.Q) * p.width(p.N));
    edge = memory.take<float>(p.width(p.Q));
    scaled = memory.take<float>(p.width(p.Q) * p.width(p.N));
    x = memory.take<float>(p.width(p.Q) * p.width(p.P));
  }
  // From B, dt and x the state that leaves; from C and dy, of which it takes `scale`, the gradient of one that enters.
  void run(const SSD& p, const Clocks& clocks, const Item& item, bool adjoint, float* states) {
    const i64 N = p.width(p.N), P = p.width(p.P);
    load_row_tile(adjoint ? p.right : p.left, item.b, item.g, item.start, item.T, p.N, rows, N);
    for (i64 h = item.from; h < item.to; h++) {
      clock.read(p, clocks, item.b, h, item.k);
      load_row_tile(adjoint ? p.dy : p.x, item.b, h, item.start, item.T, p.P, x, P);
      for (int d = 0; d < 2; d++) {
        if (!p.has(d)) continue;
        clock.to_edge(d, !adjoint, item.padded, edge);
        if (adjoint)
          for (i64 t = 0; t < item.padded; t++) edge[t] *= p.scale();
        scale_rows(rows, item.T, N, edge, adjoint ? nullptr : clock.dt[d], scaled);
        product<false>(p.N, P, item.T, scaled, 1, N, x, P, states + p.state_at(d, item.b, h, item.k), P);
      }
    }
  }
};

// In place: from the states that chunks leave to those that enter them. For the adjoint, from the gradients of states
// that enter to those of states that leave; the gradient of each chunk's whole logarithm (base 2) is in dtotal.
void carry(const SSD& p, const Clocks& clocks, int d, i64 b, i64 h, bool adjoint, float* states, double* dtotal,
           float* run) {
  const i64 K = p.K(), size = p.state_size();
  const bool ahead = adjoint ? d : !d;
  memset(run, 0, size * sizeof(float));
  for (i64 i = 0; i < K; i++) {
    const i64 k = ahead ? i : K - 1 - i;
    float* state = states + p.state_at(d, b, h, k);
    const float decay = exp2v(splat((float)clocks.total[Clocks::place(p, d, b, h, k)]))[0];
    const float* entering = at<const float>(p.states) + p.state_at(d, b, h, k);
    double total = 0;
    for (i64 j = 0; j < size; j += 4 * LANES) {
      vf dot = {};
      for (i64 l = j; l < lesser(size, j + 4 * LANES); l += LANES) {
        vf own = load(state + l), carried = load(run + l);
        store(state + l, carried);
        store(run + l, decay * carried + own);
        if (adjoint) dot += load(entering + l) * carried;
      }
      if (adjoint) total += sum_of(dot);
    }
    if (adjoint) dtotal[((p.slot(d) * p.B + b) * p.H + h) * K + k] = total * decay;
  }
}

// ---- forward ------------------------------------------------------------------------------------------------------

struct Forward {
  Group group;
  Clock clock;
  Weights weights;
  float *edge, *scaled, *x, *mixed, *y;
  Forward(Cutter& memory, const SSD& p)
      : group(memory, p), weights(memory, p.width(p.Q)) {
    const i64 Q = p.width(p.Q), P = p.width(p.P);
    edge = memory.take<float>(Q);
    scaled = memory.take<float>(Q * p.width(p.N));
    x = memory.take<float>(Q * P);
    mixed = memory.take<float>(ROW_BLOCK * Q);
    y = memory.take<float>(Q * P);
  }
  void run(const SSD& p, const Clocks& clocks, const Item& item) {
    group.read(p, item);
    for (i64 h = item.from; h < item.to; h++) run_head(p, clocks, item, h);
  }
  void run_head(const SSD& p, const Clocks& clocks, const Item& item, i64 h) {
    const i64 N = p.width(p.N), P = p.width(p.P);
    const float skip = p.D ? at<const float>(p.D)[h] : 0.0f, scale = p.scale();
    clock.read(p, clocks, item.b, h, item.k);
    load_row_tile(p.x, item.b, h, item.start, item.T, p.P, x, P);
    for (i64 first = 0; first < item.T; first += ROW_BLOCK) {
      const i64 R = lesser(ROW_BLOCK, item.T - first);
      const Reach reach(p, first, R, item.T);
      for (i64 sub = first; sub < first + R; sub += SUB) {
        weights.read(p, clock, sub, item.padded);
        for (i64 i = 0; i < lesser(SUB, item.T - sub); i++)
          mix(p, group.products + (sub + i) * item.padded, sub, i, item.padded, scale, skip,
              mixed + (sub + i - first) * item.padded);
      }
      product<false>(R, P, reach.high - reach.low, mixed + reach.low, item.padded, 1, x + reach.low * P, P,
                     y + first * P, P);
    }
    for (int d = 0; d < 2 && p.K() > 1; d++) {
      if (!p.has(d)) continue;
      clock.to_edge(d, false, item.padded, edge);
      for (i64 t = 0; t < item.padded; t++) edge[t] *= scale;
      scale_rows(group.right, item.T, N, edge, nullptr, scaled);
      product<true>(item.T, P, p.N, scaled, N, 1, at<const float>(p.states) + p.state_at(d, item.b, h, item.k), P, y,
                    P);
    }
    store_row_tile(p.y, item.b, h, item.start, item.T, p.P, y, P);
  }
  // One row of scale G W + D: what token `sub + i` reads of every token.
  void mix(const SSD& p, const float* products, i64 sub, i64 i, i64 padded, float scale, float skip, float* out) {
    const float before = scale * weights.rows[0][i], after = scale * weights.rows[1][i];
    const float *column = weights.column_dt, *ahead = weights.block[0] + i * SUB, *back = weights.block[1] + i * SUB;
    const float *dt = clock.dt[0], *dt_back = clock.dt[1];
    i64 s = 0;
    for (; s < sub; s += LANES) store(out + s, before * load(column + s) * load(products + s));
    for (; s < sub + SUB; s += LANES)
      store(out + s, (load(ahead + s - sub) * load(dt + s) + load(back + s - sub) * load(dt_back + s)) * scale *
                         load(products + s));
    for (; s < padded; s += LANES) store(out + s, after * load(column + s) * load(products + s));
    out[sub + i] += scale * (dt[sub + i] + dt_back[sub + i]) * products[sub + i] + skip;
  }
};

// ---- backward -----------------------------------------------------------------------------------------------------

struct Backward {
  Group group;
  Clock clock;
  Weights weights;
  float *edge, *leaving, *scaled, *wide, *x, *x_columns, *dy, *dx, *mixed, *dmixed, *dproducts, *dleft, *dright;
  float *state_columns, *own, *dsum[2], *ddt[2];
  Backward(Cutter& memory, const SSD& p)
      : group(memory, p), weights(memory, p.width(p.Q)) {
    const i64 Q = p.width(p.Q), P = p.width(p.P), N = p.width(p.N);
    edge = memory.take<float>(Q), leaving = memory.take<float>(Q);
    scaled = memory.take<float>(Q * N), wide = memory.take<float>(Q * N);
    x = memory.take<float>(Q * P), x_columns = memory.take<float>(P * Q);
    dy = memory.take<float>(Q * P), dx = memory.take<float>(Q * P);
    mixed = memory.take<float>(ROW_BLOCK * Q), dmixed = memory.take<float>(ROW_BLOCK * Q);
    dproducts = memory.take<float>(Q * Q);
    dleft = memory.take<float>(Q * N), dright = memory.take<float>(Q * N);
    state_columns = memory.take<float>(P * N), own = memory.take<float>(Q);
    for (int d = 0; d < 2; d++) dsum[d] = memory.take<float>(Q), ddt[d] = memory.take<float>(Q);
  }
  // dstates: gradients of the states that leave chunks. records: dA of both directions and dD, by head and chunk.
  void run(const SSD& p, const Clocks& clocks, const Item& item, const float* dstates, const double* dtotal,
           double* records, float* parts) {
    const i64 N = p.width(p.N), Q = item.padded;
    group.read(p, item);
    memset(state_columns, 0, p.width(p.P) * N * sizeof(float));
    memset(dproducts, 0, item.T * Q * sizeof(float));
    memset(dleft, 0, item.T * N * sizeof(float));
    memset(dright, 0, item.T * N * sizeof(float));
    for (i64 h = item.from; h < item.to; h++) run_head(p, clocks, item, h, dstates, dtotal, records);
    product<true>(item.T, N, item.T, dproducts, Q, 1, group.left, N, dright, N);
    product<true>(item.T, N, item.T, dproducts, 1, Q, group.right, N, dleft, N);
    float* out = parts + ((item.part * p.B + item.b) * p.G + item.g) * p.L * 2 * N + item.start * 2 * N;
    for (i64 t = 0; t < item.T; t++) {
      memcpy(out + t * 2 * N, dleft + t * N, N * sizeof(float));
      memcpy(out + t * 2 * N + N, dright + t * N, N * sizeof(float));
    }
  }
  void run_head(const SSD& p, const Clocks& clocks, const Item& item, i64 h, const float* dstates, const double* dtotal,
                double* records) {
    const i64 P = p.width(p.P), Q = item.padded, T = item.T;
    const float skip = p.D ? at<const float>(p.D)[h] : 0.0f, scale = p.scale();
    double* record = records + ((item.b * p.H + h) * p.K() + item.k) * 3;
    clock.read(p, clocks, item.b, h, item.k);
    load_row_tile(p.x, item.b, h, item.start, T, p.P, x, P);
    load_row_tile(p.dy, item.b, h, item.start, T, p.P, dy, P);
    for (i64 j = 0; j < p.P; j++) memset(x_columns + j * Q, 0, Q * sizeof(float));
    transpose_copy(x, P, T, p.P, x_columns, Q);
    double dskip = 0;
    for (i64 t = 0; t < T; t++) {
      vf dot = {};
      for (i64 j = t * P; j < (t + 1) * P; j += LANES) {
        vf g = load(dy + j);
        dot += g * load(x + j);
        store(dx + j, skip * g);
        store(dy + j, scale * g);
      }
      dskip += sum_of(dot);
    }
    record[2] = dskip;
    for (int d = 0; d < 2; d++) {
      memset(dsum[d], 0, Q * sizeof(float));
      memset(ddt[d], 0, Q * sizeof(float));
    }
    for (i64 first = 0; first < T; first += ROW_BLOCK) {
      const i64 R = lesser(ROW_BLOCK, T - first);
      const Reach reach(p, first, R, T);
      product<false>(R, Q, p.P, dy + first * P, P, 1, x_columns, Q, dmixed, Q);
      for (i64 sub = first; sub < first + R; sub += SUB) {
        weights.read(p, clock, sub, Q);
        for (i64 i = 0; i < lesser(SUB, T - sub); i++) mix_back(sub, i, Q, (sub + i - first) * Q);
      }
      product<true>(reach.high - reach.low, P, R, mixed + reach.low, 1, Q, dy + first * P, P, dx + reach.low * P, P);
    }
    // so far ddt holds sums over the other readers of each token, by which dt_s and, with the other sign, S_s grow
    for (int d = 0; d < 2; d++)
      for (i64 t = 0; t < T; t++) {
        dsum[d][t] -= ddt[d][t] * clock.dt[d][t];
        ddt[d][t] += own[t];
      }
    double total[2] = {0, 0};
    for (int d = 0; d < 2 && p.K() > 1; d++) {
      if (!p.has(d)) continue;
      total[d] = dtotal[((p.slot(d) * p.B + item.b) * p.H + h) * p.K() + item.k];
      through_states(p, item, h, d, dstates, total[d]);
    }
    store_row_tile(p.dx, item.b, h, item.start, T, p.P, dx, P);
    for (int d = 0; d < 2; d++)
      if (p.has(d)) record[d] = step_back(p, item, h, d, total[d]);
  }
  // One row: W G into mixed, and from the gradient of that row those of G, of the sums and of the step sizes.
  void mix_back(i64 sub, i64 i, i64 Q, i64 row) {
    const float before = weights.rows[0][i], after = weights.rows[1][i], *column = weights.column;
    const float *g = group.products + (sub + i) * Q, *dm = dmixed + row;
    float *m = mixed + row, *dg = dproducts + (sub + i) * Q;
    vf sum[2] = {};
    const auto step = [&](i64 s, vf w, int d) {
      vf dt = load(clock.dt[d] + s), products = load(g + s), gradient = load(dm + s), weighted = w * dt;
      vf through = gradient * products * w;
      store(ddt[d] + s, load(ddt[d] + s) + through);
      sum[d] += through * dt;
      store(m + s, weighted * products);
      store(dg + s, load(dg + s) + gradient * weighted);
    };
    for (i64 s = 0; s < sub; s += LANES) step(s, before * load(column + s), 0);
    for (i64 s = sub; s < sub + SUB; s += LANES) {
      vf dt = load(clock.dt[0] + s), dt_back = load(clock.dt[1] + s), products = load(g + s), gradient = load(dm + s);
      vf ahead = load(weights.block[0] + i * SUB + s - sub), back = load(weights.block[1] + i * SUB + s - sub);
      vf through = gradient * products, weighted = ahead * dt + back * dt_back;
      store(ddt[0] + s, load(ddt[0] + s) + through * ahead);
      store(ddt[1] + s, load(ddt[1] + s) + through * back);
      sum[0] += through * ahead * dt;
      sum[1] += through * back * dt_back;
      store(m + s, weighted * products);
      store(dg + s, load(dg + s) + gradient * weighted);
    }
    for (i64 s = sub + SUB; s < Q; s += LANES) step(s, after * load(column + s), 1);
    for (int d = 0; d < 2; d++) dsum[d][sub + i] += sum_of(sum[d]);
    const i64 t = sub + i;
    const float dt = clock.dt[0][t] + clock.dt[1][t];
    own[t] = dm[t] * g[t];
    m[t] += dt * g[t];
    dg[t] += dt * dm[t];
  }
  // The gradients that flow through the state that enters the chunk and the one that leaves it.
  void through_states(const SSD& p, const Item& item, i64 h, int d, const float* dstates, double& total) {
    const i64 P = p.width(p.P), N = p.width(p.N), T = item.T;
    const i64 here = p.state_at(d, item.b, h, item.k);
    const float *entering = at<const float>(p.states) + here, *dleaving = dstates + here;
    clock.to_edge(d, false, item.padded, edge);
    transpose_copy(entering, P, p.N, p.P, state_columns, N);
    product<false>(T, N, p.P, dy, P, 1, state_columns, N, wide, N);
    for (i64 t = 0; t < T; t++) {
      vf dot = {};
      for (i64 j = t * N; j < (t + 1) * N; j += LANES) {
        vf g = edge[t] * load(wide + j);
        dot += g * load(group.right + j);
        store(dright + j, load(dright + j) + g);
      }
      const float grown = sum_of(dot);
      dsum[d][t] += grown;
      if (d) total += grown;  // there the sum runs from t to the end of the chunk
    }
    clock.to_edge(d, true, item.padded, leaving);
    scale_rows(group.left, T, N, leaving, clock.dt[d], scaled);
    product<true>(T, P, p.N, scaled, N, 1, dleaving, P, dx, P);
    transpose_copy(dleaving, P, p.N, p.P, state_columns, N);
    product<false>(T, N, p.P, x, P, 1, state_columns, N, wide, N);
    for (i64 t = 0; t < T; t++) {
      vf dot = {};
      const float weight = leaving[t] * clock.dt[d][t];
      for (i64 j = t * N; j < (t + 1) * N; j += LANES) {
        dot += load(group.left + j) * load(wide + j);
        store(dleft + j, load(dleft + j) + weight * load(wide + j));
      }
      const float through = sum_of(dot);
      ddt[d][t] += leaving[t] * through;
      dsum[d][t] -= weight * through;
      if (!d) total += weight * through;
    }
  }
  // From the gradients of the running sums those of each step's logarithm, of dt and of A; return the part of dA.
  double step_back(const SSD& p, const Item& item, i64 h, int d, double run) {
    const float A = at<const float>(p.steps[d].A)[h];
    float* out = at<float>(p.ddt[d]) + (item.b * p.L + item.start) * p.H + h;
    double dA = 0;
    for (i64 t = item.T - 1; t >= 0; t--) {
      // sum[0][t] includes step t, sum[1][t] does not; the backward direction reads -sum
      if (!d) run += dsum[d][t];
      if (clock.dt[d][t] * A * LOG2E < FORGETS) run = 0;  // what is left are roundings of larger terms
      out[t * p.H] = (float)(ddt[d][t] + run * A);
      dA += run * clock.dt[d][t];
      if (d) run -= dsum[d][t];
    }
    return dA;
  }
};

// Bytes of a worker.
template <class Worker> i64 size_of(const SSD& p) {
  Cutter size;
  Worker probe(size, p);
  return ceil_div(size.used, 128) * 128;
}
// Run work(worker, i) for all i on all threads; each thread builds its worker in its part of `memory`.
template <class Worker, class Work> void on_all_threads(const SSD& p, char* memory, i64 count, const Work& work) {
  const i64 each = size_of<Worker>(p);
#pragma omp parallel num_threads(p.threads)
  {
    FlushDenormals flush;
    Cutter mine{memory + thread_number() * each};
    Worker worker(mine, p);
#pragma omp for schedule(dynamic)
    for (i64 i = 0; i < count; i++) work(worker, i);
  }
}

struct Carrier {
  float* run;
  Carrier(Cutter& memory, const SSD& p) { run = memory.take<float>(p.state_size()); }
};
void fill_states(const SSD& p, char* memory, const Clocks& clocks, bool adjoint, float* states, double* dtotal) {
  on_all_threads<StateWorker>(p, memory, Item::count(p), [&](StateWorker& w, i64 i) {
    w.run(p, clocks, Item(p, i), adjoint, states);
  });
  on_all_threads<Carrier>(p, memory, p.directions() * p.B * p.H, [&](Carrier& w, i64 i) {
    const int d = p.has(0) ? (int)(i / (p.B * p.H)) : 1;
    i %= p.B * p.H;
    carry(p, clocks, d, i / p.H, i % p.H, adjoint, states, dtotal, w.run);
  });
}
void fill_clocks(const SSD& p, const Clocks& clocks) {
#pragma omp parallel for num_threads(p.threads)
  for (i64 i = 0; i < 2 * p.B * p.H * p.K(); i++)
    clocks.fill(p, (int)(i / (p.B * p.H * p.K())), i / (p.H * p.K()) % p.B, i / p.K() % p.H, i % p.K());
}

}  // namespace duality
}  // namespace

// Return 0, or 1 if memory ran out.
SSM_API int ssm_ssd(const int64_t* arguments) {
  using namespace duality;
  const SSD& p = *(const SSD*)arguments;
  const i64 worker = greater(size_of<Forward>(p), greater(size_of<StateWorker>(p), size_of<Carrier>(p)));
  Scratch scratch;
  Clocks clocks(scratch, p);
  char* memory = nullptr;
  for (int pass = 0; pass < 2; pass++) {
    if (pass) clocks = Clocks(scratch, p);
    memory = scratch.take<char>(p.threads * worker);
    if (!pass && !scratch.commit()) return 1;
  }
  fill_clocks(p, clocks);
  if (p.K() > 1) fill_states(p, memory, clocks, false, at<float>(p.states), nullptr);
  on_all_threads<Forward>(p, memory, Item::count(p), [&](Forward& w, i64 i) { w.run(p, clocks, Item(p, i)); });
  return 0;
}

// Return 0, or 1 if memory ran out.
SSM_API int ssm_ssd_backward(const int64_t* arguments) {
  using namespace duality;
  const SSD& p = *(const SSD*)arguments;
  const i64 N = p.width(p.N), states = p.K() > 1 ? p.directions() * p.B * p.H * p.K() : 0;
  const i64 worker = greater(size_of<Backward>(p), greater(size_of<StateWorker>(p), size_of<Carrier>(p)));
  char* memory = nullptr;
  float *dstates = nullptr, *parts = nullptr;
  double *dtotal = nullptr, *records = nullptr;
  Scratch scratch;
  Clocks clocks(scratch, p);
  for (int pass = 0; pass < 2; pass++) {
    if (pass) clocks = Clocks(scratch, p);
    memory = scratch.take<char>(p.threads * worker);
    dstates = scratch.take<float>(states * p.state_size());
    dtotal = scratch.take<double>(states);
    records = scratch.take<double>(p.B * p.H * p.K() * 3);
    parts = scratch.take<float>(p.parts() * p.B * p.G * p.L * 2 * N);
    if (!pass && !scratch.commit()) return 1;
  }
  fill_clocks(p, clocks);
  if (states) fill_states(p, memory, clocks, true, dstates, dtotal);
  on_all_threads<Backward>(p, memory, Item::count(p), [&](Backward& w, i64 i) {
    w.run(p, clocks, Item(p, i), dstates, dtotal, records, parts);
  });
  const i64 pitch = p.B * p.G * p.L * 2 * N;
#pragma omp parallel for num_threads(p.threads)
  for (i64 i = 0; i < p.B * p.G * p.L; i++) {
    const i64 t = i % p.L, g = i / p.L % p.G, b = i / p.L / p.G;
    float* sum = parts + i * 2 * N;
    for (i64 part = 1; part < p.parts(); part++)
      for (i64 j = 0; j < 2 * N; j += LANES) store(sum + j, load(sum + j) + load(sum + part * pitch + j));
    store_row_tile(p.dleft, b, g, t, 1, p.N, sum, N);
    store_row_tile(p.dright, b, g, t, 1, p.N, sum + N, N);
  }
  for (i64 h = 0; h < p.H; h++) {
    double sum[3] = {0, 0, 0};
    for (i64 b = 0; b < p.B; b++)
      for (i64 k = 0; k < p.K(); k++)
        for (int j = 0; j < 3; j++) sum[j] += j < 2 && !p.has(j) ? 0 : records[((b * p.H + h) * p.K() + k) * 3 + j];
    for (int d = 0; d < 2; d++)
      if (p.has(d)) at<float>(p.dA[d])[h] = (float)sum[d];
    if (p.D) at<float>(p.dD)[h] = (float)sum[2];
  }
  return 0;
}
