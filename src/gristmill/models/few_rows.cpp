// Products of a few rows with a large matrix, as decoding needs them: y = x w^T * scale + bias.
//
// x [M, K] bf16 with M at most 16, w [N, K] bf16 or int8, scale and bias [N] bf16 (or none),
// y [M, N] bf16; sums in fp32; K a multiple of 32 and N at least 32. Built at run time for
// processors with AMX (see few_rows.py), against torch's stable ABI.
//
// A tile register takes 16 rows of w, 32 columns at a time, as they lie in memory: nothing is
// packed beforehand, and each weight is read once whatever M is. x is the small operand.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

using bf16 = c10::BFloat16;
using torch::stable::Tensor;

// Rows of w at a time: two tiles. How far ahead memory is asked for, in bytes: with it a core reads
// as fast as a plain sum of the same memory, without it at 0.8 of that.
constexpr int64_t ROWS = 32, AHEAD = 4608;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

struct Call {
  const uint32_t* x;  // pairs of columns, [K / 2, M]
  const bf16 *scale, *bias;
  bf16* y;
  int64_t M, K, N;
};

static inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64)
    _mm_prefetch(static_cast<const char*>(from) + at, _MM_HINT_T0);
}

// 32 columns of 32 rows of w into tiles 2 and 3.
static inline void load(const bf16* w, int64_t K, bf16*) {
  _tile_loadd(2, w, K * 2);
  _tile_loadd(3, w + 16 * K, K * 2);
}

// bf16 holds every int8 exactly.
static inline void load(const int8_t* w, int64_t K, bf16* room) {
  for (int64_t row = 0; row < ROWS; row++) {
    const __m256i bytes = _mm256_loadu_si256((const __m256i*)(w + row * K));
    const __m512i low = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes));
    const __m512i high = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1));
    const __m512bh wide = _mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low));
    _mm512_store_si512(room + row * 32, (__m512i)wide);
  }
  _tile_loadd(2, room, 64);
  _tile_loadd(3, room + 16 * 32, 64);
}

template <typename W>
static void some_rows(const Call& c, const W* w, int64_t begin, int64_t end) {
  TileConfig config;
  for (int tile = 0; tile < 5; tile++) config.rows[tile] = 16;
  config.column_bytes[0] = config.column_bytes[1] = config.column_bytes[4] = c.M * 4;
  config.column_bytes[2] = config.column_bytes[3] = 64;
  _tile_loadconfig(&config);
  alignas(64) float sums[ROWS * 16];
  alignas(64) bf16 room[ROWS * 32];
  for (int64_t block = begin; block < end; block++) {
    // The last block reaches back where N is no multiple: some results are written twice, alike.
    const int64_t n = std::min(block * ROWS, c.N - ROWS);
    const W* at = w + n * c.K;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t k = 0; k < c.K; k += 32) {
      prefetch((const char*)at + AHEAD + k * ROWS * sizeof(W), 32 * ROWS * sizeof(W));
      _tile_loadd(4, c.x + k / 2 * c.M, c.M * 4);
      load(at + k, c.K, room);
      _tile_dpbf16ps(0, 2, 4);
      _tile_dpbf16ps(1, 3, 4);
    }
    _tile_stored(0, sums, c.M * 4);
    _tile_stored(1, sums + 16 * c.M, c.M * 4);
    for (int64_t row = 0; row < ROWS; row++) {
      const float scale = c.scale ? static_cast<float>(c.scale[n + row]) : 1.0f;
      const float bias = c.bias ? static_cast<float>(c.bias[n + row]) : 0.0f;
      for (int64_t m = 0; m < c.M; m++)
        c.y[m * c.N + n + row] = static_cast<bf16>(sums[row * c.M + m] * scale + bias);
    }
  }
  _tile_release();
}

template <typename W>
static void product(const Call& c, const W* w) {
  const int64_t blocks = (c.N + ROWS - 1) / ROWS;
  const int64_t least = std::max<int64_t>(1, 32768 / (c.K * ROWS));
  torch::stable::parallel_for(
      0, blocks, least, [&](int64_t begin, int64_t end) { some_rows(c, w, begin, end); });
}

Tensor few_rows(Tensor x, Tensor w, std::optional<Tensor> scale, std::optional<Tensor> bias) {
  const int64_t M = x.size(0), K = x.size(1), N = w.size(0);
  Tensor y = torch::stable::new_empty(x, {M, N});
  const uint32_t* pairs = static_cast<const uint32_t*>(x.data_ptr());
  std::vector<uint32_t> turned;
  if (M > 1) {
    turned.resize(M * K / 2);
    for (int64_t m = 0; m < M; m++)
      for (int64_t k = 0; k < K / 2; k++) turned[k * M + m] = pairs[m * (K / 2) + k];
    pairs = turned.data();
  }
  const Call call{
      pairs,
      scale ? static_cast<const bf16*>(scale->data_ptr()) : nullptr,
      bias ? static_cast<const bf16*>(bias->data_ptr()) : nullptr,
      static_cast<bf16*>(y.data_ptr()),
      M,
      K,
      N};
  if (w.element_size() == 1)
    product(call, static_cast<const int8_t*>(w.data_ptr()));
  else
    product(call, static_cast<const bf16*>(w.data_ptr()));
  return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(gristmill, m) {
  m.def("few_rows(Tensor x, Tensor w, Tensor? scale, Tensor? bias) -> Tensor");
  // The kernel of the system hands out tile registers on request.
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;
  syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
}

STABLE_TORCH_LIBRARY_IMPL(gristmill, CPU, m) { m.impl("few_rows", TORCH_BOX(&few_rows)); }
