// Products of a few rows with a large matrix.

#pragma once

#include "registers.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <optional>
#include <vector>

using torch::stable::Tensor;

// ---- y = x w^T * scale + bias -------------------------------------------------------------------
//
// x [M, K] with M at most 16, w [N, K] bf16 or int8, scale and bias [N] (or none), y [M, N]; K a
// multiple of 32 and N at least 32. A tile register takes 16 rows of w, 32 columns at a time, as
// they lie in memory: nothing is packed beforehand, and each weight is read once whatever M is. x
// is the small operand.

// Rows of x at most, and of w at a time: two tiles.
constexpr int64_t MOST = 16, ROWS = 32;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

// What was stored before is in memory: compilers do not know that loads of tiles read it.
inline void stored() { asm volatile("" ::: "memory"); }

// The tile registers of this thread, each of some rows and columns of four bytes, until the end of
// a block of code.
struct Tiles {
  explicit Tiles(std::initializer_list<std::pair<int64_t, int64_t>> shapes) {
    TileConfig config;
    int tile = 0;
    for (const auto& [rows, columns] : shapes) {
      config.rows[tile] = rows;
      config.column_bytes[tile++] = columns * 4;
    }
    // Not _tile_loadconfig, which tells some compilers of the first eight bytes alone.
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { _tile_release(); }

  // Two of sums, one of x, four of w.
  static Tiles for_products(int64_t M) {
    return Tiles({{16, M}, {16, M}, {16, M}, {16, 16}, {16, 16}, {16, 16}, {16, 16}});
  }

  // One of scores, of queries, of keys or values, of weights, and four of sums.
  static Tiles for_attention(int64_t M) {
    return Tiles({{16, M}, {16, M}, {16, 16}, {M, 16}, {M, 16}, {M, 16}, {M, 16}, {M, 16}});
  }
};

// A matrix of weights.
struct Matrix {
  const void* w;
  const bf16 *scale, *bias;
  int64_t N, K;
  bool int8;

  Matrix(const Tensor& w, const std::optional<Tensor>& scale, const std::optional<Tensor>& bias)
      : w(w.data_ptr()), scale(maybe(scale)), bias(maybe(bias)), N(w.size(0)), K(w.size(1)),
        int8(w.element_size() == 1) {}

  static const bf16* maybe(const std::optional<Tensor>& tensor) {
    return tensor ? static_cast<const bf16*>(tensor->data_ptr()) : nullptr;
  }

  const void* row(int64_t n) const {
    return static_cast<const char*>(w) + n * K * (int8 ? 1 : 2);
  }
  int64_t blocks() const { return (N + ROWS - 1) / ROWS; }
  // The last block reaches back where N is no multiple: some results are written twice, alike.
  int64_t first_row(int64_t block) const { return std::min(block * ROWS, N - ROWS); }
};

// The rows of x, as pairs of columns [K / 2, M], filled up with zeros to a multiple of 64 columns.
struct Rows {
  int64_t M, K;
  std::vector<uint32_t> pairs;

  Rows(const bf16* x, int64_t M, int64_t K) : M(M), K(K), pairs((K + 63) / 64 * 32 * M) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(x);
    for (int64_t m = 0; m < M; m++)
      for (int64_t k = 0; k < K / 2; k++) pairs[k * M + m] = from[m * (K / 2) + k];
  }
};

// Ask for 64 bytes of each of the 32 rows that a thread comes to next, while it computes those
// before. With it a core reads faster than it sums the same memory, without it at 0.8 of that.
static inline void prefetch(const void* next, int64_t row_bytes, int64_t at) {
  for (int64_t row = 0; row < ROWS; row++)
    _mm_prefetch(static_cast<const char*>(next) + row * row_bytes + at, _MM_HINT_T1);
}

// 32 rows of w times x: sums [32, M]. `next` are the rows that come after.
static void multiply(const Rows& x, const bf16* w, const void* next, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  stored();
  for (int64_t k = 0; k < x.K; k += 32) {
    prefetch(next, x.K * 2, k * 2);
    _tile_loadd(2, &x.pairs[k / 2 * x.M], x.M * 4);
    _tile_loadd(3, w + k, x.K * 2);
    _tile_loadd(4, w + k + 16 * x.K, x.K * 2);
    _tile_dpbf16ps(0, 3, 2);
    _tile_dpbf16ps(1, 4, 2);
  }
  _tile_stored(0, sums, x.M * 4);
  _tile_stored(1, sums + 16 * x.M, x.M * 4);
}

// What `widen` makes of int8 is so many times as large.
constexpr float WIDENED = 1 << 24;

// Of 64 int8 the first and second pairs of four (0 1, 4 5, ... and 2 3, 6 7, ...) as bf16. A byte
// at the top of an int32 converts with at most 8 significant bits, which is what bf16 holds.
static inline void widen(__m512i bytes, bf16* first, bf16* second) {
  const __m512i top = _mm512_set1_epi32(0xff000000), upper = _mm512_set1_epi32(0xffff0000);
  const auto number = [](__m512i x) { return _mm512_castps_si512(_mm512_cvtepi32_ps(x)); };
  const __m512i a = number(_mm512_slli_epi32(bytes, 24));
  const __m512i b = number(_mm512_and_si512(_mm512_slli_epi32(bytes, 16), top));
  const __m512i c = number(_mm512_and_si512(_mm512_slli_epi32(bytes, 8), top));
  const __m512i d = number(_mm512_and_si512(bytes, top));
  // (upper & b) | (a >> 16)
  _mm512_store_si512(first, _mm512_ternarylogic_epi32(upper, b, _mm512_srli_epi32(a, 16), 0xea));
  _mm512_store_si512(second, _mm512_ternarylogic_epi32(upper, d, _mm512_srli_epi32(c, 16), 0xea));
}

// 64 columns of 32 rows of w, widened, as four tiles.
struct Wide {
  alignas(64) bf16 first[ROWS * 32], second[ROWS * 32];

  void fill(const int8_t* w, int64_t K, int64_t k) {
    const __mmask64 there = K - k < 64 ? 0xffffffff : ~0ull;
    for (int64_t row = 0; row < ROWS; row++)
      widen(_mm512_maskz_loadu_epi8(there, w + row * K + k), first + row * 32, second + row * 32);
  }
};

// The same of int8, times WIDENED. Columns are paired as `widen` does it, in x too. A tile register
// waits long for what has just been stored: the next columns are widened before these are loaded.
static void multiply(const Rows& x, const int8_t* w, const void* next, float* sums) {
  Wide rooms[2];
  rooms[0].fill(w, x.K, 0);
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t k = 0; k < x.K; k += 64) {
    const Wide& room = rooms[k / 64 % 2];
    prefetch(next, x.K, k);
    if (k + 64 < x.K) rooms[(k / 64 + 1) % 2].fill(w, x.K, k + 64);
    const uint32_t* pairs = &x.pairs[k / 2 * x.M];
    stored();
    _tile_loadd(2, pairs, 2 * x.M * 4);
    _tile_loadd(3, room.first, 64);
    _tile_loadd(4, room.first + 16 * 32, 64);
    _tile_dpbf16ps(0, 3, 2);
    _tile_dpbf16ps(1, 4, 2);
    _tile_loadd(2, pairs + x.M, 2 * x.M * 4);
    _tile_loadd(5, room.second, 64);
    _tile_loadd(6, room.second + 16 * 32, 64);
    _tile_dpbf16ps(0, 5, 2);
    _tile_dpbf16ps(1, 6, 2);
  }
  _tile_stored(0, sums, x.M * 4);
  _tile_stored(1, sums + 16 * x.M, x.M * 4);
}

// A product of the rows of w from n on, with scale and bias.
struct Product {
  alignas(64) float sums[ROWS * MOST];
  __m512 scale[2], bias[2];
  int64_t M;

  Product(const Rows& x, const Matrix& matrix, int64_t n, const void* next) : M(x.M) {
    if (matrix.int8)
      multiply(x, static_cast<const int8_t*>(matrix.row(n)), next, sums);
    else
      multiply(x, static_cast<const bf16*>(matrix.row(n)), next, sums);
    const __m512 unit = _mm512_set1_ps(matrix.int8 ? 1 / WIDENED : 1.0f);
    for (int64_t half = 0; half < 2; half++) {
      const int64_t at = n + 16 * half;
      scale[half] = matrix.scale ? _mm512_mul_ps(unit, wide(matrix.scale + at)) : unit;
      bias[half] = matrix.bias ? wide(matrix.bias + at) : _mm512_setzero_ps();
    }
  }

  // 16 values of row m of x.
  __m512 of(int64_t m, int64_t half) const {
    return _mm512_fmadd_ps(column(sums + 16 * half * M + m, M), scale[half], bias[half]);
  }
};

// Fewer blocks than this are not worth another thread.
static int64_t least_blocks(int64_t K) { return std::max<int64_t>(1, 32768 / (K * ROWS)); }

// Where a product goes, and what is added to it, if anything.
struct Output {
  Matrix matrix;
  bf16* y;
  const bf16* more = nullptr;
};

// Several matrices, whose blocks the threads share as if they were one.
static void products(const Rows& x, const std::vector<Output>& outputs) {
  int64_t blocks = 0;
  for (const Output& output : outputs) blocks += output.matrix.blocks();
  const auto find = [&](int64_t block) {
    const Output* output = outputs.data();
    while (block >= output->matrix.blocks()) block -= (output++)->matrix.blocks();
    return std::pair(output, output->matrix.first_row(block));
  };
  torch::stable::parallel_for(0, blocks, least_blocks(x.K), [&](int64_t begin, int64_t end) {
    const Tiles tiles = Tiles::for_products(x.M);
    for (int64_t block = begin; block < end; block++) {
      const auto [output, n] = find(block);
      const auto [after, next] = find(std::min(block + 1, end - 1));
      const Product product(x, output->matrix, n, after->matrix.row(next));
      const int64_t N = output->matrix.N;
      for (int64_t m = 0; m < x.M; m++) {
        __m512 low = product.of(m, 0), high = product.of(m, 1);
        if (output->more) {
          low = _mm512_add_ps(low, wide(output->more + m * N + n));
          high = _mm512_add_ps(high, wide(output->more + m * N + n + 16));
        }
        narrow(output->y + m * N + n, low, high);
      }
    }
  });
}

// silu(x gate^T) * (x up^T), with scales and biases.
static void gated(const Rows& x, const Matrix& gate, const Matrix& up, bf16* y) {
  const int64_t least = std::max<int64_t>(1, least_blocks(x.K) / 2);
  torch::stable::parallel_for(0, gate.blocks(), least, [&](int64_t begin, int64_t end) {
    const Tiles tiles = Tiles::for_products(x.M);
    for (int64_t block = begin; block < end; block++) {
      const int64_t n = gate.first_row(block), next = gate.first_row(std::min(block + 1, end - 1));
      const Product first(x, gate, n, up.row(n)), second(x, up, n, gate.row(next));
      for (int64_t m = 0; m < x.M; m++)
        narrow(
            y + m * gate.N + n, _mm512_mul_ps(silu(first.of(m, 0)), second.of(m, 0)),
            _mm512_mul_ps(silu(first.of(m, 1)), second.of(m, 1)));
    }
  });
}

static bf16* data(const Tensor& tensor) { return static_cast<bf16*>(tensor.data_ptr()); }

static Rows rows_of(const Tensor& x) { return Rows(data(x), x.size(0), x.size(1)); }
