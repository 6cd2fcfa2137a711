"""Parameters, floating-point operations and memory of a model, counted from its configuration.

No torch: the planner asks these questions before anything is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from gristmill.config.model import ModelConfig

Shapes = dict[str, tuple[int, ...]]
Sizes = Mapping[str, int]
"""The axes of a mesh of processes: replicate, shard, context, tensor; one that is left out is 1."""

BYTES_PER_WEIGHT = {"32-true": 4, "bf16-mixed": 4, "bf16-true": 2}
BYTES_PER_ACTIVATION = {"32-true": 4, "bf16-mixed": 2, "bf16-true": 2}


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Name -> shape of every parameter of the decoder, in its order."""
    d, rows = config.hidden_size, config.vocab_size
    shapes: Shapes = {"embed.weight": (rows, d)}
    if config.positions == "learned":
        shapes["positions.weight"] = (config.max_seq_length, d)
    if config.embedding_norm:
        shapes |= _norm_shapes(config, "embed_norm", d)
    for layer in range(config.num_layers):
        block = _block_shapes(config, config.expert_layers[layer])
        if config.prompt_layers[layer] and config.adaption_prompt is not None:
            block["attn.prompt.vectors"] = (config.adaption_prompt.length, d)
            block["attn.prompt.gate"] = (1,)
        shapes |= {f"layers.{layer}.{name}": s for name, s in block.items()}
    shapes |= _norm_shapes(config, "norm", d)
    if not config.tie_embeddings:
        shapes |= _linear("head", rows, d, config.head_bias)
    return shapes


def _block_shapes(config: ModelConfig, has_experts: bool) -> Shapes:
    """Name -> shape of one block's parameters."""
    d, shapes = config.hidden_size, {}
    if config.pre_norm:
        shapes |= _norm_shapes(config, "attn_norm", d)
    latent = config.latent_attention is not None
    shapes |= _latent_shapes(config) if latent else _attention_shapes(config)
    if config.post_norm:
        shapes |= _norm_shapes(config, "attn_post_norm", d)
    if config.pre_norm and not config.shared_norm:
        shapes |= _norm_shapes(config, "mlp_norm", d)
    shapes |= _experts_shapes(config) if has_experts else _mlp_shapes(config)
    if config.post_norm:
        shapes |= _norm_shapes(config, "mlp_post_norm", d)
    return shapes


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (rows, columns)}
    return shapes | {f"{name}.bias": (rows,)} if bias else shapes


def _norm_shapes(config: ModelConfig, name: str, size: int) -> Shapes:
    if not config.norm_weight:
        return {}
    shapes: Shapes = {f"{name}.weight": (size,)}
    if config.norm == "layernorm" and config.norm_bias:
        shapes[f"{name}.bias"] = (size,)
    return shapes


def _attention_shapes(config: ModelConfig) -> Shapes:
    d, size, bias = config.hidden_size, config.head_size, config.qkv_bias
    q, kv = config.num_heads * size, config.kv_heads * size
    shapes = _linear("attn.q", q, d, bias)
    shapes |= _linear("attn.k", kv, d, bias) | _linear("attn.v", kv, d, bias)
    shapes |= _linear("attn.o", d, q, config.attention_out_bias)
    if config.qk_norm != "none":
        widths = (q, kv) if config.qk_norm == "full" else (size, size)
        for name, width in zip(("attn.q_norm", "attn.k_norm"), widths):
            shapes |= _norm_shapes(config, name, width)
    return shapes


def _latent_shapes(config: ModelConfig) -> Shapes:
    latent = config.latent_attention
    assert latent is not None
    d, heads = config.hidden_size, config.num_heads
    rank, rope = latent.kv_lora_rank, latent.qk_rope_head_dim
    if latent.q_lora_rank is None:
        shapes = _linear("attn.q", heads * config.head_size, d, False)
    else:
        shapes = _linear("attn.q_down", latent.q_lora_rank, d, False)
        shapes |= _norm_shapes(config, "attn.q_norm", latent.q_lora_rank)
        shapes |= _linear("attn.q_up", heads * config.head_size, latent.q_lora_rank, False)
    shapes |= _linear("attn.kv_down", rank + rope, d, False)
    shapes |= _norm_shapes(config, "attn.kv_norm", rank)
    values = latent.qk_nope_head_dim + latent.v_head_dim
    shapes |= _linear("attn.kv_up", heads * values, rank, False)
    return shapes | _linear("attn.o", d, heads * latent.v_head_dim, False)


def _mlp_shapes(config: ModelConfig, name: str = "mlp", inner: int | None = None) -> Shapes:
    d, inner, bias = config.hidden_size, inner or config.intermediate_size, config.mlp_bias
    shapes = _linear(f"{name}.gate", inner, d, bias) if config.mlp == "gated" else {}
    return shapes | _linear(f"{name}.up", inner, d, bias) | _linear(f"{name}.down", d, inner, bias)


def _experts_shapes(config: ModelConfig) -> Shapes:
    moe = config.moe
    assert moe is not None
    d, count, inner = config.hidden_size, moe.num_experts, moe.intermediate_size
    shapes: Shapes = {"mlp.selection_bias": (count,)} if moe.selection_bias else {}
    shapes["mlp.router.weight"] = (count, d)
    shapes["mlp.experts.gate.weight"] = shapes["mlp.experts.up.weight"] = (count, inner, d)
    shapes["mlp.experts.down.weight"] = (count, d, inner)
    if moe.num_shared_experts:
        shapes |= _mlp_shapes(config, "mlp.shared", moe.num_shared_experts * inner)
    return shapes


def stays_fp32(name: str) -> bool:
    """Whether a parameter is in fp32 whatever the precision of the model.

    A bias of the choice of experts is large against the differences that it makes between them.
    """
    return name.endswith(".selection_bias")


def num_parameters(config: ModelConfig) -> int:
    """Trainable numbers; a tied embedding counts once."""
    return sum(prod(shape) for shape in parameter_shapes(config).values())


def flops_per_token(
    config: ModelConfig, seq_len: int, training: bool = True, *, causal: bool = True
) -> float:
    """Floating-point operations of the matrix products for one token of a sequence, averaged.

    A product with a matrix of P numbers takes 2 P per token (a multiplication and an addition), so
    the blocks and the head take 2 (their matrix parameters); the embedding is a lookup, and the
    head counts the rows that stand for a token. Attention takes 2 heads head_size per key for the
    scores and as much for the values; a token sees (seq_len + 1) / 2 keys on average, or seq_len
    with `causal=False`, which is how torch's FlopCounterMode and most published MFU count.

    The backward pass forms two products for each one (gradients of input and of weight): training
    takes three times the forward pass. Nothing is added for recomputation (PaLM,
    arXiv:2204.02311, appendix B).
    """
    head = config.token_ids * config.hidden_size
    forward = 2.0 * head
    for window, has_experts in zip(config.windows, config.expert_layers):
        forward += 2 * _visited(config, has_experts)
        forward += _attention_width(config) * _keys_seen(
            seq_len, window if causal else None, causal
        )
    return (3 if training else 1) * forward


def _visited(config: ModelConfig, has_experts: bool) -> int:
    """Numbers in the matrices of a block that a token is multiplied with."""
    total = 0
    for name, shape in _block_shapes(config, has_experts).items():
        if ".experts." in name:
            assert config.moe is not None
            total += config.moe.num_experts_per_token * prod(shape[1:])
        elif len(shape) == 2:
            total += prod(shape)
    return total


def _attention_width(config: ModelConfig) -> int:
    """Operations of a block's attention for one token and key."""
    latent = config.latent_attention
    value = config.head_size if latent is None else latent.v_head_dim
    return 2 * config.num_heads * (config.head_size + value)


def _keys_seen(seq_len: int, window: int | None, causal: bool) -> float:
    """Keys that a token sees, averaged over a sequence."""
    if not causal:
        return seq_len
    if window is None or window >= seq_len:
        return (seq_len + 1) / 2
    return window - window * (window - 1) / (2 * seq_len)


def state_bytes(config: ModelConfig, precision: str, sizes: Sizes | None = None) -> int:
    """Weights, gradients and the two moments of AdamW, all in the type of the weights.

    bf16-mixed adds the bf16 copies of the matrices that autocast keeps for one pass. `sizes` are
    those of a mesh of processes (`Parallel`): the answer is for one of them. Matrices are cut over
    shard x context x tensor, what is no matrix is not, and weights that are put together block by
    block leave no copies.
    """
    shard, tensor = _cut(sizes)
    parts = shard * tensor
    matrices = sum(prod(s) for s in parameter_shapes(config).values() if len(s) > 1)
    numbers = matrices / parts + num_parameters(config) - matrices
    together = shard > 1 or (sizes or {}).get("replicate", 1) > 1
    copies = 2 if precision == "bf16-mixed" and not together else 0
    return int(numbers * (4 * BYTES_PER_WEIGHT[precision] + copies))


def _cut(sizes: Sizes | None) -> tuple[int, int]:
    """Into how many parts shard x context and tensor cut matrices."""
    sizes = sizes or {}
    return sizes.get("shard", 1) * sizes.get("context", 1), sizes.get("tensor", 1)


def _share(config: ModelConfig, tensor: int) -> ModelConfig:
    """The model as one of `tensor` processes computes it: a part of the heads and inner values."""
    if tensor == 1:
        return config
    return replace(
        config,
        num_heads=config.num_heads // tensor,
        num_kv_heads=config.kv_heads // tensor,
        head_dim=config.head_size,
        intermediate_size=config.intermediate_size // tensor,
    )


def activation_bytes(
    config: ModelConfig,
    micro_batch: int,
    seq_len: int,
    precision: str,
    recompute: str | float = "none",
    sizes: Sizes | None = None,
) -> int:
    """What an eager forward pass keeps for the backward pass, and what that makes again of it.

    Per token and block, d the width, q and kv the widths of queries and keys: around each of the
    two norms its input and output (2 d; RMSNorm computes in fp32 and keeps that too), queries, keys
    and values (q + 2 kv), the attention output (q) and one log-normaliser per head; the
    feed-forward keeps its inner values: gate, up, the activated gate and their product (4 f), or
    up and its activation (2 f). Each expert that a token visits keeps the token's row and one more
    product, by its weight (d + 5 f). Latent attention also keeps its small vectors, around their
    norms and with the shared key, and its output apart. Compiled blocks keep less.

    Full recomputation keeps the residual stream before each block (d), selective also the results
    of products (q + 2 kv + q + 2 d, and half of the inner values), and a number is a share between
    none and full; all of one block exists at a time in the backward pass.

    One of several processes (`sizes`) has its part of the heads and inner values and its part of
    the positions, and keeps keys and values of all positions of its heads.
    """
    context = (sizes or {}).get("context", 1)
    config = _share(config, _cut(sizes)[1])
    tokens, layers = micro_batch * seq_len // context, config.num_layers
    block, narrow = _block_bytes(config, precision), BYTES_PER_ACTIVATION[precision]
    block += 2 * narrow * (context - 1) * config.kv_heads * config.head_size
    stream = BYTES_PER_WEIGHT[precision] * config.hidden_size
    last = _norm_bytes(config, precision) * config.hidden_size
    if recompute == "none":
        return tokens * (layers * block + last)
    q, kv = config.num_heads * config.head_size, config.kv_heads * config.head_size
    kept = float(stream)
    if recompute == "selective":
        products = 2 * q + 2 * kv + 2 * config.hidden_size + _feed_forward_values(config) / 2
        kept = min(block, stream + narrow * products + 4 * config.num_heads)
    elif isinstance(recompute, float):
        kept = stream + recompute * (block - stream)
    return int(tokens * (layers * kept + block + last))


def _norm_bytes(config: ModelConfig, precision: str) -> int:
    """What a norm keeps for one value of its input."""
    wide = 8 if config.norm == "rmsnorm" else BYTES_PER_WEIGHT[precision]
    return BYTES_PER_ACTIVATION[precision] + wide


def _block_bytes(config: ModelConfig, precision: str) -> int:
    """What a block keeps for one token."""
    q, kv = config.num_heads * config.head_size, config.kv_heads * config.head_size
    norm, narrow = _norm_bytes(config, precision), BYTES_PER_ACTIVATION[precision]
    inner = _feed_forward_values(config)
    block = 2 * norm * config.hidden_size + narrow * (2 * q + 2 * kv + inner) + 4 * config.num_heads
    if precision == "bf16-mixed":
        # Each product that reads the stream has a bf16 copy of its own; one a norm is counted.
        block += narrow * config.hidden_size * (2 + (config.mlp == "gated"))
    latent = config.latent_attention
    if latent is not None:
        rank, out = latent.kv_lora_rank, config.num_heads * latent.v_head_dim
        block += norm * (rank + (latent.q_lora_rank or 0))
        block += narrow * (rank + latent.qk_rope_head_dim + out)
    return block


def _feed_forward_values(config: ModelConfig) -> int:
    """Values that the widest feed-forward layer keeps for a token."""
    dense = {"gated": 4, "plain": 2}[config.mlp] * config.intermediate_size
    moe = config.moe
    if moe is None:
        return dense
    visited = moe.num_experts_per_token * (config.hidden_size + 5 * moe.intermediate_size)
    shared = 4 * moe.num_shared_experts * moe.intermediate_size
    return max(dense if moe.num_dense_layers else 0, visited + shared)


def training_memory_bytes(
    config: ModelConfig,
    micro_batch: int,
    seq_len: int,
    precision: str,
    recompute: str | float = "none",
    sizes: Sizes | None = None,
) -> int:
    """Estimate of a training step's peak on one device: state, activations, one piece of logits.

    Of several (`sizes`), what one of them holds, with the parts of others that it has put together.

    An estimate for the planner and its messages; a dry run has the last word.
    """
    # The loss never holds more than about a thousand rows of logits, in compute type and fp32.
    shard, tensor = _cut(sizes)
    rows = min(micro_batch * seq_len, 1024)
    logits = rows * config.token_ids * (4 + BYTES_PER_ACTIVATION[precision]) // tensor
    total = state_bytes(config, precision, sizes) + logits
    total += activation_bytes(config, micro_batch, seq_len, precision, recompute, sizes)
    return total + (_gathered_bytes(config, precision, tensor) if shard > 1 else 0)


def _gathered_bytes(config: ModelConfig, precision: str, tensor: int) -> int:
    """Whole weights where each process has a part: two blocks, their gradients, and the head's."""
    block = max(sum(map(prod, _block_shapes(config, e).values())) for e in config.expert_layers)
    head = config.vocab_size * config.hidden_size * BYTES_PER_WEIGHT[precision]
    return 2 * (2 * block * BYTES_PER_ACTIVATION[precision] + head) // tensor
