// Attention of one new token of each sequence to those in its cache.

#pragma once

#include "products.h"

#include <cmath>

// ---- rotation of a head by the angles of its position -------------------------------------------

// The two halves of `turned` values each are turned, what comes behind them stays.
static void turn(
    const bf16* head, const float* cos, const float* sin, int64_t turned, int64_t D, bf16* out) {
  int64_t i = 0;
  for (; i + 16 <= turned; i += 16) {
    const __m512 a = wide(head + i), b = wide(head + turned + i);
    const __m512 c = _mm512_loadu_ps(cos + i), s = _mm512_loadu_ps(sin + i);
    narrow(out + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
    narrow(out + turned + i, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
  }
  for (; i < turned; i++) {
    const float a = head[i], b = head[turned + i];
    out[i] = static_cast<bf16>(a * cos[i] - b * sin[i]);
    out[turned + i] = static_cast<bf16>(b * cos[i] + a * sin[i]);
  }
  std::copy(head + 2 * turned, head + D, out + 2 * turned);
}

// ---- attention of one token a sequence ---------------------------------------------------------

// Where the keys and values of a block are kept, and how its heads attend.
struct Attention {
  const float *cos = nullptr, *sin = nullptr;  // [n, turned] or none
  bf16 *keys, *values;                         // [sequences, groups, room, D]
  const int64_t *rows, *positions;             // [n], sequences and places in them
  int64_t n, groups, room, D, turned = 0, window;
  float scale, softcap;

  Attention(
      const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, const Tensor& keys,
      const Tensor& values, const Tensor& rows, const Tensor& positions, int64_t window,
      double scale, double softcap)
      : keys(data(keys)), values(data(values)),
        rows(static_cast<const int64_t*>(rows.data_ptr())),
        positions(static_cast<const int64_t*>(positions.data_ptr())), n(positions.size(0)),
        groups(keys.size(1)), room(keys.size(2)), D(keys.size(3)), window(window),
        scale(static_cast<float>(scale)), softcap(static_cast<float>(softcap)) {
    if (!cos || !sin) return;
    this->cos = static_cast<const float*>(cos->data_ptr());
    this->sin = static_cast<const float*>(sin->data_ptr());
    turned = cos->size(cos->dim() - 1);
  }

  // out [n, heads, D] of q [n, heads, D], k and v [n, groups, D], all without gaps.
  void operator()(const bf16* q, const bf16* k, const bf16* v, int64_t heads, bf16* out) const {
    int64_t longest = 0;
    for (int64_t row = 0; row < n; row++) longest = std::max(longest, positions[row] + 1);
    const int64_t least = std::max<int64_t>(1, 131072 / (longest * D));
    torch::stable::parallel_for(0, n * groups, least, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t item = begin; item < end; item++) {
        const int64_t row = item / groups, each = heads / groups;
        const Text text = append(item, k + item * D, v + item * D);
        for (int64_t head = 0; head < each; head += MOST) {
          const int64_t at = (item * each + head) * D;
          gather(text, row, q + at, std::min(MOST, each - head), scratch, out + at);
        }
      }
    });
  }

 private:
  // What the heads of a group look at.
  struct Text {
    const bf16 *keys, *values;  // [count, D]
    int64_t count;
  };

  struct Scratch {
    std::vector<uint32_t> pairs;
    std::vector<float> scores;
    std::vector<bf16> weights, last;
    alignas(64) bf16 tiles[4 * 16 * 32];
    alignas(64) float sums[MOST * 64];
  };

  Text append(int64_t item, const bf16* k, const bf16* v) const {
    const int64_t row = item / groups, position = positions[row];
    const int64_t place = (rows[row] * groups + item % groups) * room * D;
    bf16 *own_keys = keys + place, *own_values = values + place;
    turn(k, cos + row * turned, sin + row * turned, turned, D, own_keys + position * D);
    std::copy_n(v, D, own_values + position * D);
    const int64_t start = window > 0 ? std::max<int64_t>(0, position + 1 - window) : 0;
    return {own_keys + start * D, own_values + start * D, position + 1 - start};
  }

  // M heads, at most 16: their queries are the few rows of two products.
  void gather(
      const Text& text, int64_t row, const bf16* q, int64_t M, Scratch& scratch, bf16* out) const {
    const int64_t padded = (text.count + 31) / 32 * 32;
    const Tiles tiles = Tiles::for_attention(M);
    scratch.scores.resize(M * padded);
    scratch.weights.resize(M * padded);
    score(text, row, q, M, padded, scratch);
    float shares[MOST];
    for (int64_t m = 0; m < M; m++)
      shares[m] = soften(&scratch.scores[m * padded], padded, &scratch.weights[m * padded]);
    for (int64_t d = 0; d < D; d += 64) {
      const int64_t width = std::min<int64_t>(64, D - d);
      sum_values(text, d, width, padded, scratch);
      for (int64_t m = 0; m < M; m++) {
        const __m512 share = _mm512_set1_ps(shares[m]);
        for (int64_t i = 0; i < width; i += 32) {
          const float* from = scratch.sums + m * 64 + i;
          narrow(
              out + m * D + d + i, _mm512_mul_ps(_mm512_load_ps(from), share),
              _mm512_mul_ps(_mm512_load_ps(from + 16), share));
        }
      }
    }
  }

  // Scores [M, padded] of the keys, -infinity behind their end.
  void score(
      const Text& text, int64_t row, const bf16* q, int64_t M, int64_t padded,
      Scratch& scratch) const {
    alignas(64) bf16 query[1024];
    scratch.pairs.resize(D / 2 * M);
    for (int64_t m = 0; m < M; m++) {
      turn(q + m * D, cos + row * turned, sin + row * turned, turned, D, query);
      const uint32_t* from = reinterpret_cast<const uint32_t*>(query);
      for (int64_t i = 0; i < D / 2; i++) scratch.pairs[i * M + m] = from[i];
    }
    for (int64_t t = 0; t < padded; t += 16) {
      const int64_t count = std::clamp<int64_t>(text.count - t, 0, 16);
      const bf16* from = text.keys + t * D;
      if (count < 16) {
        scratch.last.assign(16 * D, bf16(0));
        std::copy_n(from, count * D, scratch.last.begin());
        from = scratch.last.data();
      }
      _tile_zero(0);
      stored();
      for (int64_t d = 0; d < D; d += 32) {
        _tile_loadd(1, &scratch.pairs[d / 2 * M], M * 4);
        _tile_loadd(2, from + d, D * 2);
        _tile_dpbf16ps(0, 2, 1);
      }
      _tile_stored(0, scratch.sums, M * 4);
      const __mmask16 there = (1u << count) - 1;
      for (int64_t m = 0; m < M; m++) {
        __m512 scores = _mm512_mul_ps(column(scratch.sums + m, M), _mm512_set1_ps(scale));
        if (softcap > 0) {
          alignas(64) float each[16];
          _mm512_store_ps(each, scores);
          for (float& s : each) s = softcap * std::tanh(s / softcap);
          scores = _mm512_load_ps(each);
        }
        scores = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), there, scores);
        _mm512_storeu_ps(&scratch.scores[m * padded + t], scores);
      }
    }
  }

  // e^(score - the largest) of each; one part of their sum.
  static float soften(const float* scores, int64_t padded, bf16* weights) {
    __m512 largest = _mm512_loadu_ps(scores), total = _mm512_setzero_ps();
    for (int64_t t = 16; t < padded; t += 16)
      largest = _mm512_max_ps(largest, _mm512_loadu_ps(scores + t));
    largest = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    for (int64_t t = 0; t < padded; t += 32) {
      __m512 both[2];
      for (int64_t half = 0; half < 2; half++) {
        const __m512 found = _mm512_loadu_ps(scores + t + 16 * half);
        const __mmask16 there = _mm512_cmp_ps_mask(found, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
        both[half] = _mm512_maskz_mov_ps(there, exponential(_mm512_sub_ps(found, largest)));
        total = _mm512_add_ps(total, both[half]);
      }
      narrow(weights + t, both[0], both[1]);
    }
    return 1.0f / _mm512_reduce_add_ps(total);
  }

  // Values from d on, at most 64 wide, times their weights: sums [M, 64].
  void sum_values(
      const Text& text, int64_t d, int64_t width, int64_t padded, Scratch& scratch) const {
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t t = 0; t < padded; t += 32) {
      const int64_t there = std::min<int64_t>(32, text.count - t);
      for (int64_t i = 0; i < width; i += 32)
        pair(text.values + t * D + d + i, there, scratch.tiles + i / 16 * 512);
      stored();
      _tile_loadd(3, &scratch.weights[t], padded * 2);
      _tile_loadd(2, scratch.tiles, 64);
      _tile_dpbf16ps(4, 3, 2);
      _tile_loadd(2, scratch.tiles + 512, 64);
      _tile_dpbf16ps(5, 3, 2);
      if (width < 64) continue;
      _tile_loadd(2, scratch.tiles + 1024, 64);
      _tile_dpbf16ps(6, 3, 2);
      _tile_loadd(2, scratch.tiles + 1536, 64);
      _tile_dpbf16ps(7, 3, 2);
    }
    _tile_stored(4, scratch.sums, 256);
    _tile_stored(5, scratch.sums + 16, 256);
    _tile_stored(6, scratch.sums + 32, 256);
    _tile_stored(7, scratch.sums + 48, 256);
  }

  // 32 columns of at most 32 rows as two tiles of pairs of rows; zeros behind the last row.
  void pair(const bf16* from, int64_t count, bf16* to) const {
    alignas(64) static constexpr int16_t LOW[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,
                                                    37, 6, 38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                    11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(LOW);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t row = 0; row < 32; row += 2, to += 32) {
      const __m512i zero = _mm512_setzero_si512();
      const __m512i a = row < count ? _mm512_loadu_si512(from + row * D) : zero;
      const __m512i b = row + 1 < count ? _mm512_loadu_si512(from + (row + 1) * D) : zero;
      _mm512_store_si512(to, _mm512_permutex2var_epi16(a, low, b));
      _mm512_store_si512(to + 512, _mm512_permutex2var_epi16(a, high, b));
    }
  }
};
