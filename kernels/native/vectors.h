// Vectors of channels, and how tensors of any layout become tiles of them.

#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(enable)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#define SSM_API extern "C" __attribute__((visibility("default")))

namespace {

typedef int64_t i64;
typedef uint16_t bf16;
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef float vf_any __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef uint16_t vh_any __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

constexpr float LOG2E = 1.44269504088896f, LN2 = 0.693147180559945f;

inline vf splat(float x) { return x - vf{}; }
inline vf load(const float* p) { return *(const vf_any*)p; }
inline void store(float* p, vf v) { *(vf_any*)p = v; }
inline vf load(const bf16* p) { return (vf)(__builtin_convertvector(*(const vh_any*)p, vu) << 16); }
inline void store(bf16* p, vf v) {
  vu bits = (vu)v;
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  rounded = v == v ? rounded : vu{} + 0x7fc0;
  *(vh_any*)p = __builtin_convertvector(rounded, vh);
}
inline float as_float(i64 bits) {  // a float32 that came as an integer, see fields.py
  const int32_t low = (int32_t)bits;
  float value;
  memcpy(&value, &low, 4);
  return value;
}
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
inline void from_float(float* p, float x) { *p = x; }
inline void from_float(bf16* p, float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  *p = x == x ? (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : (bf16)0x7fc0;
}
inline float round_bf16(float x) {
  bf16 h;
  from_float(&h, x);
  return to_float(h);
}

#if LANES == 16
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif
#if defined(__clang__)
inline vf riffle_low(vf a, vf b) { return __builtin_shufflevector(a, b, LOW); }
inline vf riffle_high(vf a, vf b) { return __builtin_shufflevector(a, b, HIGH); }
#else
inline vf riffle_low(vf a, vf b) { return __builtin_shuffle(a, b, vu{LOW}); }
inline vf riffle_high(vf a, vf b) { return __builtin_shuffle(a, b, vu{HIGH}); }
#endif

// Riffling the two halves of the rows log2(LANES) times transposes a square.
inline void transpose(vf* row) {
  for (int round = 1; round < LANES; round *= 2) {
    vf next[LANES];
    UNROLL for (int i = 0; i < LANES / 2; i++) {
      next[2 * i] = riffle_low(row[i], row[i + LANES / 2]);
      next[2 * i + 1] = riffle_high(row[i], row[i + LANES / 2]);
    }
    UNROLL for (int i = 0; i < LANES; i++) row[i] = next[i];
  }
}

// Lane i of the result is the sum over the lanes of v[i].
inline vf sum_lanes(const vf* v) {
  vf s[LANES];
  UNROLL for (int i = 0; i < LANES; i++) s[i] = v[i];
  UNROLL for (int half = LANES / 2; half > 0; half /= 2) {
    UNROLL for (int i = 0; i < half; i++) s[i] = riffle_low(s[i], s[i + half]) + riffle_high(s[i], s[i + half]);
  }
  return s[0];
}

// 2^x within 1.2e-7, exactly 1 at 0; NaN stays NaN; far below -126 it is 0 or smaller than 2e-38.
inline vf exp2v(vf x) {
#if LANES == 16
  vf k = (vf)_mm512_roundscale_ps((__m512)x, 8);
#else
  x = x < -126.0f ? splat(-126.0f) : x;
  x = x > 127.0f ? splat(127.0f) : x;
  vf shifted = x + 12582912.0f;  // 1.5 * 2^23: the sum's low bits hold x rounded
  vf k = shifted - 12582912.0f;
#endif
  vf r = x - k;
  vf p = r * 0.001326472731307149f + 0.009671512991189957f;
  p = p * r + 0.05550733581185341f;
  p = p * r + 0.24022242426872253f;
  p = p * r + 0.6931470036506653f;
  p = p * r + 1.0f;
#if LANES == 16
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)k);
#else
  return (vf)((vu)p + ((vu)shifted << 23));
#endif
}
inline vf minus_abs(vf x) { return (vf)((vu)x | 0x80000000u); }
inline vf sigmoid(vf x) {
  vf w = exp2v(minus_abs(x) * LOG2E), s = 1.0f / (1.0f + w);
  return x < 0.0f ? w * s : s;
}
// log(1 + e^x) = max(x, 0) + 2 atanh(w / (2 + w)) with w = e^-|x|: accurate relative to itself for very negative x too.
inline vf softplus(vf x, vf* slope) {
  vf w = exp2v(minus_abs(x) * LOG2E);
  vf s = w / (2.0f + w), v = s * s;
  vf q = v * 0.280119925737381f + 0.28001803159713745f;
  q = q * v + 0.4002152681350708f;
  q = q * v + 0.666664183139801f;
  q = q * v + 2.0f;
  if (slope) {
    vf inverse = 1.0f / (1.0f + w);
    *slope = x < 0.0f ? w * inverse : inverse;
  }
  return (x < 0.0f ? vf{} : x) + s * q;
}

// ---- memory -------------------------------------------------------------------------------------------------------

struct Tensor {  // (B, E, L), strides in elements
  i64 address, is_bf16, stride_b, stride_e, stride_l;
};

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
inline i64 lesser(i64 a, i64 b) { return a < b ? a : b; }
inline i64 greater(i64 a, i64 b) { return a > b ? a : b; }
template <class T> inline T* at(i64 address) { return (T*)(uintptr_t)address; }

struct Cutter {  // hands out aligned pieces of memory; from base 0 it only counts
  char* base = nullptr;
  i64 used = 0;
  template <class T> T* take(i64 count) {
    T* p = (T*)((uintptr_t)base + used);
    used += ceil_div(count * (i64)sizeof(T), 128) * 128;
    return p;
  }
};
// Working memory: take everything, commit, take everything again. The last one is kept for the next call, up to
// 256 MiB: fresh pages would cost a third of a backward pass. Huge pages where the system grants them.
struct Memory {
  char* base;
  i64 size;
};
Memory* kept_memory = nullptr;

struct Scratch : Cutter {
  Memory* memory = nullptr;
  bool commit() {
    const i64 huge = 1 << 21, size = used < huge ? greater(used, 128) : ceil_div(used, huge) * huge;
    used = 0;
    memory = __atomic_exchange_n(&kept_memory, (Memory*)nullptr, __ATOMIC_ACQ_REL);
    if (memory && memory->size < size) {
      release(memory);
      memory = nullptr;
    }
    if (!memory) {
      memory = (Memory*)malloc(sizeof(Memory));
      if (!memory) return false;
      *memory = Memory{(char*)aligned_alloc(size < huge ? 128 : huge, size), size};
#if defined(__linux__)
      if (memory->base && size >= huge) madvise(memory->base, size, MADV_HUGEPAGE);
#endif
    }
    base = memory->base;
    return base != nullptr;
  }
  static void release(Memory* m) {
    if (!m) return;
    free(m->base);
    free(m);
  }
  ~Scratch() {
    if (memory && memory->base && memory->size <= (256 << 20))
      memory = __atomic_exchange_n(&kept_memory, memory, __ATOMIC_ACQ_REL);
    release(memory);
  }
};

struct FlushDenormals {  // a decayed state would otherwise crawl through denormals, and cost up to 100 times more
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(saved | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved); }
#endif
};

// dst[c][r] = src[r][c]
void transpose_copy(const float* src, i64 src_stride, i64 rows, i64 columns, float* dst, i64 dst_stride) {
  i64 r = 0;
  for (; r + LANES <= rows; r += LANES) {
    i64 c = 0;
    for (; c + LANES <= columns; c += LANES) {
      vf square[LANES];
      for (int i = 0; i < LANES; i++) square[i] = load(src + (r + i) * src_stride + c);
      transpose(square);
      for (int i = 0; i < LANES; i++) store(dst + (c + i) * dst_stride + r, square[i]);
    }
    for (; c < columns; c++)
      for (int i = 0; i < LANES; i++) dst[c * dst_stride + r + i] = src[(r + i) * src_stride + c];
  }
  for (; r < rows; r++)
    for (i64 c = 0; c < columns; c++) dst[c * dst_stride + r] = src[r * src_stride + c];
}

template <class S>
void load_tile_as(const Tensor& x, i64 b, i64 e, i64 lanes, i64 t, i64 T, float* tile) {
  const S* p = at<const S>(x.address) + b * x.stride_b + e * x.stride_e + t * x.stride_l;
  if (x.stride_e == 1 && lanes == LANES) {
    for (i64 i = 0; i < T; i++) store(tile + i * LANES, load(p + i * x.stride_l));
    return;
  }
  i64 i = 0;
  if (x.stride_l == 1) {
    for (; i + LANES <= T; i += LANES) {
      vf square[LANES];
      for (i64 j = 0; j < LANES; j++) square[j] = j < lanes ? load(p + j * x.stride_e + i) : vf{};
      transpose(square);
      for (i64 j = 0; j < LANES; j++) store(tile + (i + j) * LANES, square[j]);
    }
  }
  for (; i < T; i++)
    for (i64 j = 0; j < LANES; j++)
      tile[i * LANES + j] = j < lanes ? to_float(p[j * x.stride_e + i * x.stride_l]) : 0.0f;
}
void load_tile(const Tensor& x, i64 b, i64 e, i64 lanes, i64 t, i64 T, float* tile) {
  if (x.is_bf16) load_tile_as<bf16>(x, b, e, lanes, t, T, tile);
  else load_tile_as<float>(x, b, e, lanes, t, T, tile);
}

template <class S>
void store_tile_as(const Tensor& x, i64 b, i64 e, i64 lanes, i64 t, i64 T, const float* tile) {
  S* p = at<S>(x.address) + b * x.stride_b + e * x.stride_e + t * x.stride_l;
  if (x.stride_e == 1 && lanes == LANES) {
    for (i64 i = 0; i < T; i++) store(p + i * x.stride_l, load(tile + i * LANES));
    return;
  }
  i64 i = 0;
  if (x.stride_l == 1) {
    for (; i + LANES <= T; i += LANES) {
      vf square[LANES];
      for (i64 j = 0; j < LANES; j++) square[j] = load(tile + (i + j) * LANES);
      transpose(square);
      for (i64 j = 0; j < lanes; j++) store(p + j * x.stride_e + i, square[j]);
    }
  }
  for (; i < T; i++)
    for (i64 j = 0; j < lanes; j++) from_float(p + j * x.stride_e + i * x.stride_l, tile[i * LANES + j]);
}
void store_tile(const Tensor& x, i64 b, i64 e, i64 lanes, i64 t, i64 T, const float* tile) {
  if (x.is_bf16) store_tile_as<bf16>(x, b, e, lanes, t, T, tile);
  else store_tile_as<float>(x, b, e, lanes, t, T, tile);
}

// Weights (E, columns) of one block as [columns][LANES], lanes past the last channel 0, rounded to bf16 on request.
void load_weights(i64 address, i64 e, i64 lanes, i64 columns, float factor, bool rounded, vf* out) {
  if (lanes < LANES) memset(out, 0, columns * sizeof(vf));
  transpose_copy(at<const float>(address) + e * columns, columns, lanes, columns, (float*)out, LANES);
  for (i64 c = 0; c < columns; c++) {
    if (rounded) {
      bf16 nearest[LANES];
      store(nearest, out[c]);
      out[c] = load(nearest);
    }
    out[c] *= factor;
  }
}
// One row of weights over the channels of a block.
inline void load_rows(const float* w, i64 lanes, bool rounded, vf* out) {
  vf v = {};
  for (i64 j = 0; j < lanes; j++) v[j] = rounded ? round_bf16(w[j]) : w[j];
  *out = v;
}
// The way back: sum over `count` records, `pitch` vectors apart, added in order.
void store_weights(const vf* partial, i64 count, i64 pitch, i64 e, i64 lanes, i64 columns, i64 address) {
  if (!address) return;
  float* w = at<float>(address) + e * columns;
  for (i64 c = 0; c < columns; c++) {
    vf v = {};
    for (i64 i = 0; i < count; i++) v += partial[i * pitch + c];
    for (i64 j = 0; j < lanes; j++) w[j * columns + c] = v[j];
  }
}


}  // namespace
