// What decoding computes, for processors with AMX: products of a few rows with a large matrix, and
// attention of one new token of each sequence to those in its cache. bf16 in memory, sums in fp32.
// Built at run time (see kernels.py), against torch's stable ABI.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

using bf16 = c10::BFloat16;
using torch::stable::Tensor;

// ---- y = x w^T * scale + bias -------------------------------------------------------------------
//
// x [M, K] with M at most 16, w [N, K] bf16 or int8, scale and bias [N] (or none), y [M, N]; K a
// multiple of 32 and N at least 32. A tile register takes 16 rows of w, 32 columns at a time, as
// they lie in memory: nothing is packed beforehand, and each weight is read once whatever M is. x
// is the small operand.

// Rows of w at a time: two tiles. How far ahead memory is asked for, in bytes: with it a core reads
// as fast as a plain sum of the same memory, without it at 0.8 of that.
constexpr int64_t ROWS = 32, AHEAD = 4608;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

// A matrix and where its products with x go.
struct Matrix {
  const void* w;
  const bf16 *scale, *bias;
  bf16* y;
  int64_t N;
  bool int8;

  int64_t blocks() const { return (N + ROWS - 1) / ROWS; }
  // The last block reaches back where N is no multiple: some results are written twice, alike.
  int64_t first_row(int64_t block) const { return std::min(block * ROWS, N - ROWS); }
};

// The rows of x, as pairs of columns [K / 2, M].
struct Rows {
  const uint32_t* pairs;
  int64_t M, K;
  std::vector<uint32_t> turned;

  explicit Rows(const Tensor& x) : M(x.size(0)), K(x.size(1)) {
    pairs = static_cast<const uint32_t*>(x.data_ptr());
    if (M == 1) return;
    turned.resize(M * K / 2);
    for (int64_t m = 0; m < M; m++)
      for (int64_t k = 0; k < K / 2; k++) turned[k * M + m] = pairs[m * (K / 2) + k];
    pairs = turned.data();
  }
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

// The tile registers of this thread, for x of M rows, until the end of a block of code.
struct Tiles {
  explicit Tiles(int64_t M) {
    TileConfig config;
    for (int tile = 0; tile < 5; tile++) config.rows[tile] = 16;
    config.column_bytes[0] = config.column_bytes[1] = config.column_bytes[4] = M * 4;
    config.column_bytes[2] = config.column_bytes[3] = 64;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// 32 rows of w times x: sums [32, M].
template <typename W>
static void multiply(const Rows& x, const W* w, float* sums) {
  alignas(64) bf16 room[ROWS * 32];
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t k = 0; k < x.K; k += 32) {
    prefetch((const char*)w + AHEAD + k * ROWS * sizeof(W), 32 * ROWS * sizeof(W));
    _tile_loadd(4, x.pairs + k / 2 * x.M, x.M * 4);
    load(w + k, x.K, room);
    _tile_dpbf16ps(0, 2, 4);
    _tile_dpbf16ps(1, 3, 4);
  }
  _tile_stored(0, sums, x.M * 4);
  _tile_stored(1, sums + 16 * x.M, x.M * 4);
}

// The same with scale and bias, of the rows from n on.
static void block_of(const Rows& x, const Matrix& matrix, int64_t n, float* sums) {
  if (matrix.int8)
    multiply(x, static_cast<const int8_t*>(matrix.w) + n * x.K, sums);
  else
    multiply(x, static_cast<const bf16*>(matrix.w) + n * x.K, sums);
  if (!matrix.scale && !matrix.bias) return;
  for (int64_t row = 0; row < ROWS; row++) {
    const float scale = matrix.scale ? static_cast<float>(matrix.scale[n + row]) : 1.0f;
    const float bias = matrix.bias ? static_cast<float>(matrix.bias[n + row]) : 0.0f;
    for (int64_t m = 0; m < x.M; m++) sums[row * x.M + m] = sums[row * x.M + m] * scale + bias;
  }
}

// Fewer blocks than this are not worth another thread.
static int64_t least_blocks(int64_t K) { return std::max<int64_t>(1, 32768 / (K * ROWS)); }

static const bf16* maybe(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const bf16*>(tensor->data_ptr()) : nullptr;
}

static Matrix matrix_of(
    const Tensor& x, const Tensor& w, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& bias, Tensor& y) {
  y = torch::stable::new_empty(x, {x.size(0), w.size(0)});
  bf16* to = static_cast<bf16*>(y.data_ptr());
  return {w.data_ptr(), maybe(scale), maybe(bias), to, w.size(0), w.element_size() == 1};
}

// Several matrices, whose blocks the threads share as if they were one.
static void products(const Rows& x, const std::vector<Matrix>& matrices) {
  int64_t blocks = 0;
  for (const Matrix& matrix : matrices) blocks += matrix.blocks();
  torch::stable::parallel_for(0, blocks, least_blocks(x.K), [&](int64_t begin, int64_t end) {
    const Tiles tiles(x.M);
    alignas(64) float sums[ROWS * 16];
    for (int64_t at = begin; at < end; at++) {
      int64_t block = at;
      const Matrix* matrix = matrices.data();
      while (block >= matrix->blocks()) block -= (matrix++)->blocks();
      const int64_t n = matrix->first_row(block);
      block_of(x, *matrix, n, sums);
      for (int64_t row = 0; row < ROWS; row++)
        for (int64_t m = 0; m < x.M; m++)
          matrix->y[m * matrix->N + n + row] = static_cast<bf16>(sums[row * x.M + m]);
    }
  });
}

Tensor few_rows(Tensor x, Tensor w, std::optional<Tensor> scale, std::optional<Tensor> bias) {
  Tensor y;
  const Matrix matrix = matrix_of(x, w, scale, bias, y);
  products(Rows(x), {matrix});
  return y;
}

std::tuple<Tensor, Tensor, Tensor> few_rows_3(
    Tensor x, Tensor a, Tensor b, Tensor c, std::optional<Tensor> scale_a,
    std::optional<Tensor> scale_b, std::optional<Tensor> scale_c, std::optional<Tensor> bias_a,
    std::optional<Tensor> bias_b, std::optional<Tensor> bias_c) {
  Tensor ya, yb, yc;
  const Matrix ma = matrix_of(x, a, scale_a, bias_a, ya), mb = matrix_of(x, b, scale_b, bias_b, yb);
  const Matrix mc = matrix_of(x, c, scale_c, bias_c, yc);
  products(Rows(x), {ma, mb, mc});
  return {ya, yb, yc};
}

// silu(x gate^T) * (x up^T)
Tensor few_rows_gated(
    Tensor x, Tensor gate, Tensor up, std::optional<Tensor> scale_gate,
    std::optional<Tensor> scale_up, std::optional<Tensor> bias_gate,
    std::optional<Tensor> bias_up) {
  Tensor y;
  const Rows rows(x);
  const Matrix first = matrix_of(x, gate, scale_gate, bias_gate, y);
  const Matrix second{up.data_ptr(),   maybe(scale_up), maybe(bias_up),
                      first.y,         first.N,         up.element_size() == 1};
  const int64_t least = std::max<int64_t>(1, least_blocks(rows.K) / 2);
  torch::stable::parallel_for(0, first.blocks(), least, [&](int64_t begin, int64_t end) {
    const Tiles tiles(rows.M);
    alignas(64) float gates[ROWS * 16], ups[ROWS * 16];
    for (int64_t block = begin; block < end; block++) {
      const int64_t n = first.first_row(block);
      block_of(rows, first, n, gates);
      block_of(rows, second, n, ups);
      for (int64_t row = 0; row < ROWS; row++)
        for (int64_t m = 0; m < rows.M; m++) {
          const float g = gates[row * rows.M + m], u = ups[row * rows.M + m];
          first.y[m * first.N + n + row] = static_cast<bf16>(g / (1.0f + std::exp(-g)) * u);
        }
    }
  });
  return y;
}

// ---- attention of one token a sequence ---------------------------------------------------------

static inline __m512 wide(const bf16* p) {
  const __m512i shorts = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(shorts, 16));
}

// e^x for x <= 0: 2^n times a polynomial in what is left, to about 1e-7.
static inline __m512 exponential(__m512 x) {
  const __m512 t = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-100.0f)), _mm512_set1_ps(1.44269504f));
  const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_mul_ps(_mm512_sub_ps(t, n), _mm512_set1_ps(0.69314718f));
  __m512 p = _mm512_set1_ps(1.0f / 720);
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

struct Heads {
  const bf16 *q, *k, *v;       // [n, heads, D], [n, groups, D]
  const float *cos, *sin;      // [n, turned] or none
  bf16 *keys, *values;         // [rows, groups, room, D]
  const int64_t* positions;    // [n]
  bf16* out;                   // [n, heads, D]
  int64_t heads, groups, D, room, turned, window;
  float scale, softcap;
};

// One head with its two halves of `turned` values turned by the angles of its position.
static inline void turn(const Heads& h, const bf16* head, int64_t row, bf16* out) {
  const int64_t half = h.turned;
  const float *cos = h.cos + row * half, *sin = h.sin + row * half;
  for (int64_t i = 0; i < half; i++) {
    const float a = head[i], b = head[half + i];
    out[i] = static_cast<bf16>(a * cos[i] - b * sin[i]);
    out[half + i] = static_cast<bf16>(b * cos[i] + a * sin[i]);
  }
  for (int64_t i = 2 * half; i < h.D; i++) out[i] = head[i];
}

// The query heads of one group of one row; `room` is for scores.
static void one_group(const Heads& h, int64_t row, int64_t group, std::vector<float>& scores) {
  const int64_t D = h.D, each = h.heads / h.groups, position = h.positions[row];
  const int64_t start = h.window > 0 ? std::max<int64_t>(0, position + 1 - h.window) : 0;
  const int64_t count = position + 1 - start, padded = (count + 15) / 16 * 16;
  const int64_t place = (row * h.groups + group) * h.room * D;
  bf16 *keys = h.keys + place, *values = h.values + place;
  turn(h, h.k + (row * h.groups + group) * D, row, keys + position * D);
  std::copy_n(h.v + (row * h.groups + group) * D, D, values + position * D);
  keys += start * D, values += start * D;
  scores.resize(padded);
  alignas(64) bf16 query[1024];
  for (int64_t head = group * each; head < (group + 1) * each; head++) {
    turn(h, h.q + (row * h.heads + head) * D, row, query);
    float largest = -INFINITY;
    for (int64_t t = 0; t < count; t++) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t d = 0; d < D; d += 16)
        sum = _mm512_fmadd_ps(wide(query + d), wide(keys + t * D + d), sum);
      float score = _mm512_reduce_add_ps(sum) * h.scale;
      if (h.softcap > 0) score = h.softcap * std::tanh(score / h.softcap);
      scores[t] = score;
      largest = std::max(largest, score);
    }
    std::fill(scores.begin() + count, scores.end(), -INFINITY);
    __m512 total = _mm512_setzero_ps();
    for (int64_t t = 0; t < padded; t += 16) {
      const __mmask16 there = count - t >= 16 ? 0xffff : (1u << (count - t)) - 1;
      const __m512 shifted = _mm512_sub_ps(_mm512_loadu_ps(&scores[t]), _mm512_set1_ps(largest));
      const __m512 weight = _mm512_maskz_mov_ps(there, exponential(shifted));
      _mm512_storeu_ps(&scores[t], weight);
      total = _mm512_add_ps(total, weight);
    }
    const __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
    bf16* out = h.out + (row * h.heads + head) * D;
    for (int64_t d = 0; d < D; d += 32) {
      __m512 low = _mm512_setzero_ps(), high = low;
      for (int64_t t = 0; t < count; t++) {
        const __m512 weight = _mm512_set1_ps(scores[t]);
        low = _mm512_fmadd_ps(weight, wide(values + t * D + d), low);
        high = _mm512_fmadd_ps(weight, wide(values + t * D + d + 16), high);
      }
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, share), _mm512_mul_ps(low, share));
      _mm512_storeu_si512(out + d, (__m512i)both);
    }
  }
}

// Where the keys and values of a block are kept, and how its heads attend.
struct Attention {
  std::optional<Tensor> cos, sin;
  Tensor keys, values, positions;
  int64_t window;
  double scale, softcap;

  // out [n, heads, D] of q [n, heads, D], k and v [n, groups, D], all without gaps.
  void operator()(const Tensor& q, const Tensor& k, const Tensor& v, int64_t heads, Tensor& out) const {
    const int64_t n = positions.size(0), D = keys.size(3);
    const Heads h{
        static_cast<const bf16*>(q.data_ptr()),
        static_cast<const bf16*>(k.data_ptr()),
        static_cast<const bf16*>(v.data_ptr()),
        cos ? static_cast<const float*>(cos->data_ptr()) : nullptr,
        sin ? static_cast<const float*>(sin->data_ptr()) : nullptr,
        static_cast<bf16*>(keys.data_ptr()),
        static_cast<bf16*>(values.data_ptr()),
        static_cast<const int64_t*>(positions.data_ptr()),
        static_cast<bf16*>(out.data_ptr()),
        heads,
        keys.size(1),
        D,
        keys.size(2),
        cos ? cos->size(cos->dim() - 1) : 0,
        window,
        static_cast<float>(scale),
        static_cast<float>(softcap)};
    int64_t longest = 0;
    for (int64_t row = 0; row < n; row++) longest = std::max(longest, h.positions[row] + 1);
    const int64_t least = std::max<int64_t>(1, 65536 / (longest * D * (heads / h.groups)));
    torch::stable::parallel_for(0, n * h.groups, least, [&](int64_t begin, int64_t end) {
      std::vector<float> scores;
      for (int64_t item = begin; item < end; item++)
        one_group(h, item / h.groups, item % h.groups, scores);
    });
  }
};

Tensor attend_rows(
    Tensor q, Tensor k, Tensor v, std::optional<Tensor> cos, std::optional<Tensor> sin, Tensor keys,
    Tensor values, Tensor positions, int64_t window, double scale, double softcap) {
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  const Attention attend{cos, sin, keys, values, positions, window, scale, softcap};
  attend(q, k, v, q.size(1), out);
  return out;
}

// ---- root mean square norm: x / sqrt(mean(x^2) + eps) * weight ---------------------------------

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  const int64_t rows = x.size(0), D = x.size(1);
  Tensor y = torch::stable::new_empty(x, {rows, D});
  const bf16 *from = static_cast<const bf16*>(x.data_ptr());
  const bf16 *scale = static_cast<const bf16*>(weight.data_ptr());
  bf16* to = static_cast<bf16*>(y.data_ptr());
  for (int64_t row = 0; row < rows; row++, from += D, to += D) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < D; d += 16) sum = _mm512_fmadd_ps(wide(from + d), wide(from + d), sum);
    const float root = 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / D + static_cast<float>(eps));
    for (int64_t d = 0; d < D; d += 16) {
      const __m512 normed = _mm512_mul_ps(wide(from + d), _mm512_set1_ps(root));
      _mm256_storeu_si256(
          (__m256i*)(to + d), (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(normed, wide(scale + d))));
    }
  }
  return y;
}

// ---- a whole block: norm, attention and gated feed-forward around the residual stream ----------

static void add(const Tensor& x, Tensor& y) {
  const bf16* from = static_cast<const bf16*>(x.data_ptr());
  bf16* to = static_cast<bf16*>(y.data_ptr());
  for (int64_t i = 0; i < y.numel(); i++)
    to[i] = static_cast<bf16>(static_cast<float>(to[i]) + static_cast<float>(from[i]));
}

Tensor block(
    Tensor x, Tensor attn_norm, Tensor mlp_norm, double eps, std::optional<Tensor> cos,
    std::optional<Tensor> sin, Tensor keys, Tensor values, Tensor positions, int64_t window,
    double scale, double softcap, Tensor q, Tensor k, Tensor v, Tensor o, Tensor gate, Tensor up,
    Tensor down, std::optional<Tensor> scale_q, std::optional<Tensor> scale_k,
    std::optional<Tensor> scale_v, std::optional<Tensor> scale_o, std::optional<Tensor> scale_gate,
    std::optional<Tensor> scale_up, std::optional<Tensor> scale_down, std::optional<Tensor> bias_q,
    std::optional<Tensor> bias_k, std::optional<Tensor> bias_v, std::optional<Tensor> bias_o,
    std::optional<Tensor> bias_gate, std::optional<Tensor> bias_up,
    std::optional<Tensor> bias_down) {
  const auto [queries, new_keys, new_values] = few_rows_3(
      rms_norm(x, attn_norm, eps), q, k, v, scale_q, scale_k, scale_v, bias_q, bias_k, bias_v);
  Tensor attended = torch::stable::new_empty(x, {x.size(0), q.size(0)});
  const Attention attend{cos, sin, keys, values, positions, window, scale, softcap};
  attend(queries, new_keys, new_values, q.size(0) / keys.size(3), attended);
  Tensor y = few_rows(attended, o, scale_o, bias_o);
  add(x, y);
  const Tensor inner = few_rows_gated(
      rms_norm(y, mlp_norm, eps), gate, up, scale_gate, scale_up, bias_gate, bias_up);
  Tensor z = few_rows(inner, down, scale_down, bias_down);
  add(y, z);
  return z;
}

STABLE_TORCH_LIBRARY_FRAGMENT(gristmill, m) {
  m.def("few_rows(Tensor x, Tensor w, Tensor? scale, Tensor? bias) -> Tensor");
  m.def(
      "few_rows_3(Tensor x, Tensor a, Tensor b, Tensor c, Tensor? scale_a, Tensor? scale_b, "
      "Tensor? scale_c, Tensor? bias_a, Tensor? bias_b, Tensor? bias_c) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "few_rows_gated(Tensor x, Tensor gate, Tensor up, Tensor? scale_gate, Tensor? scale_up, "
      "Tensor? bias_gate, Tensor? bias_up) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def(
      "attend_rows(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor(a!) keys, "
      "Tensor(b!) values, Tensor positions, int window, float scale, float softcap) -> Tensor");
  m.def(
      "block(Tensor x, Tensor attn_norm, Tensor mlp_norm, float eps, Tensor? cos, Tensor? sin, "
      "Tensor(a!) keys, Tensor(b!) values, Tensor positions, int window, float scale, "
      "float softcap, Tensor q, Tensor k, Tensor v, Tensor o, Tensor gate, Tensor up, "
      "Tensor down, Tensor? scale_q, Tensor? scale_k, Tensor? scale_v, Tensor? scale_o, "
      "Tensor? scale_gate, Tensor? scale_up, Tensor? scale_down, Tensor? bias_q, "
      "Tensor? bias_k, Tensor? bias_v, Tensor? bias_o, Tensor? bias_gate, Tensor? bias_up, "
      "Tensor? bias_down) -> Tensor");
  // The kernel of the system hands out tile registers on request.
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;
  syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
}

STABLE_TORCH_LIBRARY_IMPL(gristmill, CPU, m) {
  m.impl("few_rows", TORCH_BOX(&few_rows));
  m.impl("few_rows_3", TORCH_BOX(&few_rows_3));
  m.impl("few_rows_gated", TORCH_BOX(&few_rows_gated));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("block", TORCH_BOX(&block));
  m.impl("attend_rows", TORCH_BOX(&attend_rows));
}
