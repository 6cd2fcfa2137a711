// What decoding computes, for processors with AMX: products of a few rows with a large matrix,
// attention of one new token of each sequence to those in its cache, whole blocks of both, and what
// surrounds the products of a prompt. bf16 in memory, sums in fp32. Built at run time (see
// kernels.py), against torch's stable ABI.

#include "attention.h"

#include <torch/csrc/stable/library.h>

#include <sys/syscall.h>
#include <unistd.h>

#include <memory>
#include <tuple>

// ---- products and attention as operators --------------------------------------------------------

Tensor few_rows(Tensor x, Tensor w, std::optional<Tensor> scale, std::optional<Tensor> bias) {
  Tensor y = torch::stable::new_empty(x, {x.size(0), w.size(0)});
  products(rows_of(x), {{Matrix(w, scale, bias), data(y)}});
  return y;
}

std::tuple<Tensor, Tensor, Tensor> few_rows_3(
    Tensor x, Tensor a, Tensor b, Tensor c, std::optional<Tensor> scale_a,
    std::optional<Tensor> scale_b, std::optional<Tensor> scale_c, std::optional<Tensor> bias_a,
    std::optional<Tensor> bias_b, std::optional<Tensor> bias_c) {
  const auto room = [&](const Tensor& w) {
    return torch::stable::new_empty(x, {x.size(0), w.size(0)});
  };
  Tensor ya = room(a), yb = room(b), yc = room(c);
  products(
      rows_of(x), {{Matrix(a, scale_a, bias_a), data(ya)},
                   {Matrix(b, scale_b, bias_b), data(yb)},
                   {Matrix(c, scale_c, bias_c), data(yc)}});
  return {ya, yb, yc};
}

Tensor few_rows_gated(
    Tensor x, Tensor gate, Tensor up, std::optional<Tensor> scale_gate,
    std::optional<Tensor> scale_up, std::optional<Tensor> bias_gate,
    std::optional<Tensor> bias_up) {
  Tensor y = torch::stable::new_empty(x, {x.size(0), gate.size(0)});
  gated(rows_of(x), Matrix(gate, scale_gate, bias_gate), Matrix(up, scale_up, bias_up), data(y));
  return y;
}

Tensor attend_rows(
    Tensor q, Tensor k, Tensor v, std::optional<Tensor> cos, std::optional<Tensor> sin, Tensor keys,
    Tensor values, Tensor rows, Tensor positions, int64_t window, double scale, double softcap) {
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  const Attention attend(cos, sin, keys, values, rows, positions, window, scale, softcap);
  attend(data(q), data(k), data(v), q.size(1), data(out));
  return out;
}

// ---- root mean square norm: x / sqrt(mean(x^2) + eps) * weight ---------------------------------

static void norm_rows(
    const bf16* x, const bf16* weight, double eps, int64_t rows, int64_t D, bf16* y) {
  for (int64_t row = 0; row < rows; row++, x += D, y += D) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < D; d += 16) sum = _mm512_fmadd_ps(wide(x + d), wide(x + d), sum);
    const float root = 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / D + static_cast<float>(eps));
    for (int64_t d = 0; d < D; d += 16) {
      const __m512 normed = _mm512_mul_ps(wide(x + d), _mm512_set1_ps(root));
      narrow(y + d, _mm512_mul_ps(normed, wide(weight + d)));
    }
  }
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  const int64_t D = x.size(1), least = std::max<int64_t>(1, 32768 / D);
  torch::stable::parallel_for(0, x.size(0), least, [&](int64_t begin, int64_t end) {
    norm_rows(data(x) + begin * D, data(weight), eps, end - begin, D, data(y) + begin * D);
  });
  return y;
}

// ---- what surrounds the large products of a prompt, in one pass over memory each ----------------

// silu(gate) * up, of any shape without gaps; a multiple of 32 numbers.
Tensor silu_times(Tensor gate, Tensor up) {
  Tensor y = torch::stable::empty_like(gate);
  const bf16 *g = data(gate), *u = data(up);
  bf16* to = data(y);
  torch::stable::parallel_for(0, gate.numel() / 32, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * 32; i < end * 32; i += 32)
      narrow(
          to + i, _mm512_mul_ps(silu(wide(g + i)), wide(u + i)),
          _mm512_mul_ps(silu(wide(g + i + 16)), wide(u + i + 16)));
  });
  return y;
}

// q [B, T, heads, D] turned, as [B, heads, T, D]; k, turned, and v [B, T, groups, D] are written to
// keys and values [B, groups, room, D] from position `start` on. cos and sin [T, turned].
Tensor keep(
    Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor keys, Tensor values,
    int64_t start) {
  const int64_t B = q.size(0), T = q.size(1), heads = q.size(2), D = q.size(3);
  const int64_t groups = keys.size(1), room = keys.size(2), turned = cos.size(cos.dim() - 1);
  Tensor out = torch::stable::new_empty(q, {B, heads, T, D});
  const int64_t least = std::max<int64_t>(1, 32768 / (heads * D));
  torch::stable::parallel_for(0, B * T, least, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; token++) {
      const int64_t b = token / T, t = token % T;
      const float* c = static_cast<const float*>(cos.data_ptr()) + t * turned;
      const float* s = static_cast<const float*>(sin.data_ptr()) + t * turned;
      for (int64_t head = 0; head < heads; head++)
        turn(
            data(q) + (token * heads + head) * D, c, s, turned, D,
            data(out) + ((b * heads + head) * T + t) * D);
      for (int64_t group = 0; group < groups; group++) {
        const int64_t from = (token * groups + group) * D;
        const int64_t to = ((b * groups + group) * room + start + t) * D;
        turn(data(k) + from, c, s, turned, D, data(keys) + to);
        std::copy_n(data(v) + from, D, data(values) + to);
      }
    }
  });
  return out;
}

// ---- a whole block: norm, attention and gated feed-forward around the residual stream ----------

Tensor block(
    Tensor x, Tensor attn_norm, Tensor mlp_norm, double eps, std::optional<Tensor> cos,
    std::optional<Tensor> sin, Tensor keys, Tensor values, Tensor rows, Tensor positions,
    int64_t window, double scale, double softcap, Tensor q, Tensor k, Tensor v, Tensor o,
    Tensor gate, Tensor up, Tensor down, std::optional<Tensor> scale_q,
    std::optional<Tensor> scale_k, std::optional<Tensor> scale_v, std::optional<Tensor> scale_o,
    std::optional<Tensor> scale_gate, std::optional<Tensor> scale_up,
    std::optional<Tensor> scale_down, std::optional<Tensor> bias_q,
    std::optional<Tensor> bias_k, std::optional<Tensor> bias_v, std::optional<Tensor> bias_o,
    std::optional<Tensor> bias_gate, std::optional<Tensor> bias_up,
    std::optional<Tensor> bias_down) {
  const Matrix mq(q, scale_q, bias_q), mk(k, scale_k, bias_k), mv(v, scale_v, bias_v);
  const Matrix mo(o, scale_o, bias_o), mgate(gate, scale_gate, bias_gate);
  const Matrix mup(up, scale_up, bias_up), mdown(down, scale_down, bias_down);
  const int64_t M = x.size(0), D = x.size(1);
  const auto room = [M](int64_t size) { return std::make_unique_for_overwrite<bf16[]>(M * size); };
  const auto normed = room(D), queries = room(mq.N), new_keys = room(mk.N), new_values = room(mv.N);
  const auto attended = room(mo.K), y = room(D), inner = room(mgate.N);
  norm_rows(data(x), data(attn_norm), eps, M, D, normed.get());
  products(
      Rows(normed.get(), M, D),
      {{mq, queries.get()}, {mk, new_keys.get()}, {mv, new_values.get()}});
  const Attention attend(cos, sin, keys, values, rows, positions, window, scale, softcap);
  attend(queries.get(), new_keys.get(), new_values.get(), mq.N / attend.D, attended.get());
  products(Rows(attended.get(), M, mo.K), {{mo, y.get(), data(x)}});
  norm_rows(y.get(), data(mlp_norm), eps, M, D, normed.get());
  gated(Rows(normed.get(), M, D), mgate, mup, inner.get());
  Tensor z = torch::stable::new_empty(x, {M, D});
  products(Rows(inner.get(), M, mdown.K), {{mdown, data(z), y.get()}});
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
  m.def("silu_times(Tensor gate, Tensor up) -> Tensor");
  m.def(
      "keep(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) keys, "
      "Tensor(b!) values, int start) -> Tensor");
  m.def(
      "attend_rows(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor(a!) keys, "
      "Tensor(b!) values, Tensor rows, Tensor positions, int window, float scale, "
      "float softcap) -> Tensor");
  m.def(
      "block(Tensor x, Tensor attn_norm, Tensor mlp_norm, float eps, Tensor? cos, Tensor? sin, "
      "Tensor(a!) keys, Tensor(b!) values, Tensor rows, Tensor positions, int window, float scale, "
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
  m.impl("silu_times", TORCH_BOX(&silu_times));
  m.impl("keep", TORCH_BOX(&keep));
  m.impl("block", TORCH_BOX(&block));
  m.impl("attend_rows", TORCH_BOX(&attend_rows));
}
