"""The mixture of experts against a loop over experts, and against transformers' blocks."""

import pytest
import torch
import torch.nn.functional as F

from gristmill.config.model import MixtureOfExperts as Settings
from gristmill.config.model import ModelConfig
from gristmill.models import moe
from gristmill.models.moe import (
    MixtureOfExperts,
    balance_loss,
    count_visits,
    move_biases,
    sort_by_expert,
)

HIDDEN, INNER = 32, 24

KINDS = {
    "softmax": {},
    "not normalised": {"normalize": False, "scale": 3.0},
    "sigmoid": {"score": "sigmoid", "num_experts_per_token": 3},
    "bias": {"score": "sigmoid", "selection_bias": True, "scale": 2.5},
    "groups max": {"num_groups": 4, "num_groups_per_token": 2},
    "groups top2": {"num_groups": 2, "group_score": "top2", "selection_bias": True},
    "shared": {"num_shared_experts": 2},
    "all": {"num_experts_per_token": 8},
    "one": {"num_experts_per_token": 1, "normalize": False},
}


def build(hidden=HIDDEN, inner=INNER, seed=0, **settings) -> MixtureOfExperts:
    settings = {"num_experts": 8, "intermediate_size": inner, **settings}
    layer = MixtureOfExperts(ModelConfig(hidden_size=hidden, moe=Settings(**settings)))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in layer.named_parameters():
        std = 0.5 if name.startswith(("router", "selection")) else 0.2
        parameter.data.normal_(0, std, generator=generator)
    return layer


def tokens(*shape, seed=1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def looped(layer: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """One token after the other, one expert after the other."""
    choice, out = layer.choose(x.flatten(0, 1)), []
    weights = [m.weight for m in (layer.experts.gate, layer.experts.up, layer.experts.down)]
    for token, experts, shares in zip(x.flatten(0, 1), choice.experts, choice.weights):
        y = torch.zeros_like(token)
        for expert, share in zip(experts.tolist(), shares):
            gate, up, down = (w[expert] for w in weights)
            y = y + share * (down @ (F.silu(gate @ token) * (up @ token)))
        out.append(y)
    y = torch.stack(out).view(x.shape)
    return y + layer.shared(x) if layer.moe.num_shared_experts else y


def run(forward, layer, x, *, autocast=False):
    """Output, gradient of x and gradients of all parameters."""
    layer.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = forward(x)
        y = y[0] if isinstance(y, tuple) else y
    (y.float() * tokens(*y.shape, seed=2)).sum().backward()
    trained = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **trained}


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, value.float().abs().max().item())
        torch.testing.assert_close(
            found[name].float() / scale, value.float() / scale, rtol=0, atol=tolerance, msg=name
        )


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_a_loop(kind):
    layer, x = build(**KINDS[kind]), tokens(2, 9, HIDDEN)
    assert_close(run(layer, layer, x), run(lambda x: looped(layer, x), layer, x))


@pytest.mark.parametrize(("hidden", "inner"), [(32, 21), (30, 24), (13, 7)])
def test_sizes_that_no_kernel_likes(hidden, inner):
    layer, x = build(hidden, inner), tokens(2, 5, hidden)
    assert_close(run(layer, layer, x), run(lambda x: looped(layer, x), layer, x))


@pytest.mark.parametrize("precision", ["mixed", "true"])
def test_rounded_groups_change_nothing(precision, monkeypatch):
    layer, x = build(num_experts_per_token=3), tokens(2, 300, HIDDEN)
    if precision == "true":
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"):
        assert layer._group_multiple(layer.choose(x.flatten(0, 1))) == moe.ROUNDED
    # What nobody may read is poisoned.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        rounded = run(layer, layer, x, autocast=precision == "mixed")
        monkeypatch.setattr(layer, "_group_multiple", lambda choice: 1)
        plain = run(layer, layer, x, autocast=precision == "mixed")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(value.isfinite().all() for value in rounded.values())
    # Products of other sizes add up in another order, in bf16.
    assert_close(rounded, plain, tolerance=1e-2)


@pytest.mark.parametrize("multiple", [1, 4])
def test_rows_lie_by_expert_in_the_order_of_tokens(multiple):
    experts = torch.tensor([[5, 0], [0, 3], [5, 3], [0, 5]])
    rows = sort_by_expert(experts, 6, multiple)
    assert rows.visits.tolist() == [3, 0, 0, 2, 0, 3]
    starts = [0, *rows.ends.tolist()]
    assert all(start % multiple == 0 for start in starts)
    for token, (mine, slots) in enumerate(zip(experts.tolist(), rows.slots.tolist())):
        for expert, slot in zip(mine, slots):
            assert starts[expert] <= slot < starts[expert + 1]
            assert rows.source[slot] == token
    assert len(set(rows.slots.flatten().tolist())) == 8
    fives = [rows.slots[0, 0], rows.slots[2, 0], rows.slots[3, 1]]
    assert fives == sorted(fives)


def test_tokens_do_not_know_of_each_other():
    layer, x = build(), tokens(1, 40, HIDDEN)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, found = layer(x)[0][:, order], layer(x[:, order])[0]
        one = torch.cat([layer(x[:, i : i + 1])[0] for i in range(40)], 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(one[:, order], expected, rtol=0, atol=1e-5)


def test_no_token_is_turned_away_and_experts_may_have_none():
    """All tokens want the same two experts: both take them all, the others learn nothing."""
    layer, x = build(), tokens(1, 50, HIDDEN).abs()
    layer.router.weight.data = torch.arange(8.0).view(8, 1).expand(8, HIDDEN).contiguous()
    found = run(layer, layer, x)
    assert_close(found, run(lambda x: looped(layer, x), layer, x))
    for name in ("gate", "up", "down"):
        gradient = found[f"experts.{name}.weight"].flatten(1).abs().sum(1)
        assert (gradient[:6] == 0).all()
        assert (gradient[6:] > 0).all()


def test_the_bias_chooses_and_weighs_nothing():
    layer, x = build(selection_bias=True, score="sigmoid"), tokens(7, HIDDEN)
    layer.selection_bias.data = torch.tensor([9.0, 0, 0, 0, 0, 0, 0, 9.0])
    choice = layer.choose(x)
    assert set(choice.experts.flatten().tolist()) == {0, 7}
    scores = torch.sigmoid(x @ layer.router.weight.T).gather(1, choice.experts)
    torch.testing.assert_close(choice.weights, scores / scores.sum(1, keepdim=True))
    assert not layer.selection_bias.requires_grad


def test_only_the_best_groups_are_visited():
    layer = build(num_groups=4, num_groups_per_token=1, num_experts_per_token=2, num_experts=8)
    assert all(a // 2 == b // 2 for a, b in layer.choose(tokens(30, HIDDEN)).experts.tolist())
    # By its best expert the first group wins, by its two best the second.
    worth = torch.tensor([[0.9, 0.0, 0.0, 0.0, 0.8, 0.7, 0.0, 0.0]])
    for group_score, group in (("max", 0), ("top2", 1)):
        layer = build(num_groups=2, group_score=group_score)
        inside = layer._best_groups(worth).isfinite()[0].tolist()
        assert inside == [group == 0] * 4 + [group == 1] * 4


def test_scores_are_fp32_under_autocast():
    layer, x = build(), tokens(64, HIDDEN)
    expected = layer.choose(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.choose(x)
    assert torch.equal(found.experts, expected.experts)
    assert torch.equal(found.weights, expected.weights)
    assert found.weights.dtype == torch.float32


@pytest.mark.parametrize("precision", ["mixed", "true"])
def test_bf16_is_close_to_fp32(precision):
    layer, x = build(num_shared_experts=1), tokens(2, 30, HIDDEN)
    layer.bfloat16().float()  # weights that both types have
    x = x.bfloat16().float()
    expected = run(layer, layer, x)
    if precision == "true":
        layer, x = layer.bfloat16(), x.bfloat16()
    found = run(layer, layer, x, autocast=precision == "mixed")
    assert found["y"].dtype == torch.bfloat16
    for name, value in expected.items():
        assert (found[name].float() - value).norm() < 0.02 * value.norm(), name


def test_few_tokens_do_not_copy_all_experts(monkeypatch):
    """One token under autocast: the products run on the weights as they are."""
    layer, dtypes = build(), []
    product = moe.grouped_linear

    def watched(rows, weight, ends):
        dtypes.append(weight.dtype)
        return product(rows, weight, ends)

    monkeypatch.setattr(moe, "grouped_linear", watched)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            layer(tokens(1, 1, HIDDEN))
            assert set(dtypes) == {torch.float32}
            layer(tokens(1, 4, HIDDEN))
        assert dtypes[3:] == [torch.bfloat16] * 3
        layer(tokens(1, 1, HIDDEN))
    assert dtypes[6:] == [torch.bfloat16] * 3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_compiled_equals_eager(precision):
    layer = build(num_shared_experts=1, balance_loss=0.01, num_experts_per_token=3)
    x, autocast = tokens(2, 200, HIDDEN), precision == "bf16-mixed"
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    found = run(compiled, layer, x, autocast=autocast)
    expected = run(layer, layer, x, autocast=autocast)
    assert_close(found, expected, tolerance=1e-2 if autocast else 1e-5)


def test_shapes_on_the_meta_device():
    layer = build(balance_loss=0.1).to("meta")
    y, load = layer(torch.empty(2, 5, HIDDEN, device="meta"))
    assert y.shape == (2, 5, HIDDEN)
    assert load.balance.shape == ()


def test_the_same_twice_to_the_bit():
    layer, x = build(num_experts_per_token=4), tokens(4, 50, HIDDEN)
    first, second = run(layer, layer, x), run(layer, layer, x)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_balance_loss_is_there_in_training_when_it_weighs_something():
    x = tokens(1, 6, HIDDEN)
    layer = build(balance_loss=0.01)
    y, load = layer(x)
    assert load.balance.dtype == torch.float32
    assert load.balance.shape == ()
    load.balance.backward()
    assert layer.router.weight.grad.abs().sum() > 0
    layer.eval()
    again, none = layer(x)
    assert none is None
    assert torch.equal(again, y)
    assert build()(x)[1] == (None, None)


def test_balance_loss_of_even_and_of_certain_routers():
    even = torch.full((8, 4), 0.25)
    assert balance_loss(even, torch.tensor([4, 4, 4, 4])) == 2  # two experts a token
    certain = torch.eye(4)[torch.zeros(8, dtype=torch.long)]
    assert balance_loss(certain, torch.tensor([8, 0, 0, 0])) == 4


def test_balance_loss_is_that_of_transformers_for_one_layer():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layer, x = build(balance_loss=0.1, num_experts_per_token=3), tokens(2, 20, HIDDEN)
    found = layer(x)[1].balance
    logits = x.flatten(0, 1) @ layer.router.weight.T
    theirs = load_balancing_loss_func((logits,), 8, 3)
    torch.testing.assert_close(found, theirs, rtol=1e-6, atol=1e-6)
    layer.zero_grad()
    found.backward()
    ours = layer.router.weight.grad.clone()
    layer.zero_grad()
    theirs.backward()
    torch.testing.assert_close(ours, layer.router.weight.grad, rtol=1e-5, atol=1e-6)


def test_visits_are_those_of_counted_tokens():
    layer, x = build(selection_bias=True), tokens(2, 5, HIDDEN)
    experts = layer(x)[1].experts
    assert experts.shape == (2, 5, 2)
    counted = torch.tensor([[True] * 5, [True, False, True, False, False]])
    expected = torch.zeros(8, dtype=torch.long)
    for row, column in counted.nonzero():
        expected[experts[row, column]] += 1
    assert count_visits([experts, experts], counted, 8).tolist() == [expected.tolist()] * 2


def test_biases_move_by_the_sign_of_what_is_lacking():
    layer = build(num_experts=4, selection_bias=True)
    before = layer.selection_bias.clone()
    visits = torch.tensor([[3, 5, 0, 4]])
    move_biases(layer, visits, torch.tensor(0.125))
    moved = torch.tensor([0.0, -1.0, 1.0, -1.0])  # the mean is 3
    torch.testing.assert_close(layer.selection_bias - before, 0.125 * moved)


def mixtral():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_local_experts=8,
        num_experts_per_tok=2,
        experts_implementation="eager",
    )
    return MixtralSparseMoeBlock(config), {}


def qwen3_moe(normalize):
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=normalize,
        experts_implementation="eager",
    )
    return Qwen3MoeSparseMoeBlock(config), {"num_experts_per_token": 3, "normalize": normalize}


def deepseek_v3():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        n_routed_experts=8,
        num_local_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        n_shared_experts=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        experts_implementation="eager",
    )
    ours = {
        "num_experts_per_token": 3,
        "num_shared_experts": 2,
        "score": "sigmoid",
        "scale": 2.5,
        "selection_bias": True,
        "num_groups": 4,
        "num_groups_per_token": 2,
        "group_score": "top2",
    }
    return DeepseekV3MoE(config), ours


BLOCKS = {
    "mixtral": mixtral,
    "qwen3_moe": lambda: qwen3_moe(True),
    "qwen3_moe, not normalised": lambda: qwen3_moe(False),
    "deepseek_v3": deepseek_v3,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_transformers(name):
    theirs, settings = BLOCKS[name]()
    layer, x = build(**settings), tokens(2, 16, HIDDEN)
    experts = layer.experts
    with torch.no_grad():
        theirs.gate.weight.copy_(layer.router.weight)
        stacked = torch.cat([experts.gate.weight, experts.up.weight], 1)
        theirs.experts.gate_up_proj.copy_(stacked)
        theirs.experts.down_proj.copy_(experts.down.weight)
        if layer.moe.selection_bias:
            theirs.gate.e_score_correction_bias.copy_(layer.selection_bias)
        for part in ("gate", "up", "down") if layer.moe.num_shared_experts else ():
            weight = getattr(layer.shared, part).weight
            getattr(theirs.shared_experts, f"{part}_proj").weight.copy_(weight)
    found = run(layer, layer, x)
    expected = run(theirs, theirs, x)
    gradients = {
        "router.weight": expected["gate.weight"],
        "experts.gate.weight": expected["experts.gate_up_proj"][:, :INNER],
        "experts.up.weight": expected["experts.gate_up_proj"][:, INNER:],
        "experts.down.weight": expected["experts.down_proj"],
    }
    for part in ("gate", "up", "down") if layer.moe.num_shared_experts else ():
        gradients[f"shared.{part}.weight"] = expected[f"shared_experts.{part}_proj.weight"]
    assert_close(found, {"y": expected["y"], "x": expected["x"], **gradients})


def test_training_loss_is_that_of_transformers(tmp_path):
    """With their `output_router_logits`, of one block."""
    import transformers

    from gristmill.formats.model_dir import load_model

    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        router_aux_loss_coef=0.3,
        output_router_logits=True,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    theirs = transformers.MixtralForCausalLM(config)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path).train()
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    loss = ours(ids, targets) / 38
    torch.testing.assert_close(loss, theirs(ids, labels=ids).loss, rtol=0, atol=1e-5)
    without = ours.eval()(ids, targets) / 38
    assert loss - without > 0.3 * 2 * 0.9
