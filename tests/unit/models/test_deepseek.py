from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from gristmill.config.model import LatentAttention, MixtureOfExperts, ModelConfig
from gristmill.formats import hf
from gristmill.formats.model_dir import load_model
from gristmill.models import zoo
from gristmill.models.cache import kv_cache_bytes
from gristmill.models.check import check_config
from gristmill.models.counts import num_parameters
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights
from gristmill.util.errors import UserError

# What the files of the three repositories say, but for words without consequence.
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
COMMON = {
    "attention_bias": False,
    "hidden_act": "silu",
    "aux_loss_alpha": 0.001,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_layer_freq": 1,
    "tie_word_embeddings": False,
}
V3 = {
    **COMMON,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
MOONLIGHT = {
    **V3,
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "vocab_size": 163840,
}
V2_LITE = {
    **COMMON,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
V2 = {
    **V2_LITE,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
FILES = {
    "DeepSeek-V2": V2,
    "DeepSeek-V2-Lite": V2_LITE,
    "DeepSeek-V3": V3,
    "Moonlight-16B-A3B-Instruct": MOONLIGHT,
}
PUBLISHED = {
    "DeepSeek-V2": 235_741_434_880,
    "DeepSeek-V2-Lite": 15_706_484_224,
    "DeepSeek-V3": 671_026_419_200,
    "Moonlight-16B-A3B-Instruct": 15_960_110_208,
}


def parse(raw):
    return zoo.family_of(raw).from_hf_config(raw)


@pytest.mark.parametrize("name", FILES)
def test_the_named_size_is_what_the_file_says(name):
    config = parse({**FILES[name], "gristmill": {"name": name}})
    assert config == zoo.get(name)
    assert num_parameters(config) == PUBLISHED[name]


def test_the_cache_is_small():
    # The paper's 576 numbers for each token and block, in bf16.
    assert kv_cache_bytes(zoo.get("DeepSeek-V3"), 1, 1) == 61 * 576 * 2


def test_scores_grow_with_yarn_over_whole_heads():
    growth = 0.1 * 0.707 * 3.6888794541139363 + 1
    assert zoo.get("DeepSeek-V2-Lite").score_scale == pytest.approx(192**-0.5 * growth**2)
    assert zoo.get("Moonlight-16B-A3B").score_scale == 192**-0.5
    plain = parse({**V2_LITE, "rope_scaling": {**YARN, "mscale": 0.707}})
    assert plain.attention_scale is None


def test_tensors_that_predict_a_second_token_are_left_out():
    family, config = zoo.family("deepseek_v3"), zoo.get("DeepSeek-V3")
    assert family.is_dropped("model.layers.61.eh_proj.weight", config)
    assert not family.is_dropped("model.layers.60.mlp.gate.weight", config)
    assert family.is_dropped("model.layers.2.eh_proj.weight", replace(config, num_layers=2))
    assert family.to_hf_config(zoo.get("DeepSeek-V3"))["num_nextn_predict_layers"] == 0


def test_a_model_without_experts_has_an_architecture_too():
    config = ModelConfig(
        family="deepseek_v3",
        norm_eps=1e-6,
        latent_attention=LatentAttention(
            kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
        ),
    )
    words = zoo.family("deepseek_v3").to_hf_config(config)
    assert words["first_k_dense_replace"] == 12
    assert parse(words) == config


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {**V3, "quantization_config": {"quant_method": "fp8"}},
            r"quantised \(quantization_config, fp8\).*fp8_cast_bf16",
        ),
        ({**V3, "num_key_value_heads": 8}, "num_key_value_heads is 8 .*Supported: 128"),
        ({**V3, "rope_interleave": False}, "rope_interleave is False"),
        ({**V3, "attention_bias": True}, "attention_bias is True"),
        ({**V3, "topk_method": "greedy"}, "topk_method is 'greedy'"),
        ({**V3, "kv_lora_rank": None}, "kv_lora_rank is missing"),
        ({**V3, "moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({**V2, "topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'.*group_limited_greedy"),
        ({**V2, "norm_topk_prob": True}, "norm_topk_prob is True"),
        ({**V2, "scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
    ],
)
def test_what_we_would_compute_otherwise_is_refused(raw, message):
    with pytest.raises(UserError, match=message):
        parse(raw)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_a_model_with_ordinary_attention_is_refused(family):
    with pytest.raises(UserError, match="the model has none. Set latent_attention"):
        zoo.family(family).to_hf_config(ModelConfig(family=family))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"qkv_bias": True}, "qkv_bias"),
        ({"attention_out_bias": True}, "attention_out_bias"),
        ({"qkv_clip": 8.0}, "qkv_clip"),
        ({"head_dim": 32}, "head_dim"),
        ({"rope_fraction": 0.5}, "rope_fraction"),
        ({"num_kv_heads": 4}, "fewer num_kv_heads"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"qk_norm": "head"}, "qk_norm"),
    ],
)
def test_switches_that_latent_attention_lacks_are_refused(options, what):
    latent = LatentAttention(
        kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
    )
    with pytest.raises(UserError, match=f"latent_attention with {what}"):
        check_config(ModelConfig(latent_attention=latent, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 3}, "num_experts 8 is no multiple of num_groups 3"),
        ({"num_groups": 2, "num_groups_per_token": 3}, "num_groups_per_token 3 .* num_groups 2"),
        ({"num_groups": 4, "num_experts_per_token": 3}, "3 is more than the 2 experts of 1 groups"),
        ({"num_experts_per_token": 9}, "num_experts_per_token 9 .* num_experts 8"),
    ],
)
def test_experts_out_of_reach_are_refused(options, message):
    moe = MixtureOfExperts(num_experts=8, intermediate_size=16)
    with pytest.raises(UserError, match=message):
        check_config(ModelConfig(moe=replace(moe, **options)))


def tiny_words():
    words = {**V3, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    words |= {"num_key_value_heads": 4, "intermediate_size": 48, "moe_intermediate_size": 16}
    words |= {"n_routed_experts": 16, "vocab_size": 64, "first_k_dense_replace": 1}
    words |= {"kv_lora_rank": 16, "q_lora_rank": 8, "max_position_embeddings": 128}
    return words


def tiny_model():
    model = Decoder(parse(tiny_words()))
    init_weights(model, 0)
    return model


def test_a_second_prediction_in_the_files_is_passed_over(tmp_path):
    model = tiny_model()
    hf.write(tmp_path / "out", model.config, model.state_dict(), tokenizer_dir=None)
    file = tmp_path / "out" / "model.safetensors"
    extra = {f"model.layers.{model.config.num_layers}.eh_proj.weight": torch.ones(32, 64)}
    save_file(load_file(file) | extra, file)
    back = load_model(tmp_path / "out")
    assert all(torch.equal(back.state_dict()[k], v) for k, v in model.state_dict().items())


def test_the_bias_of_the_choice_is_never_rounded(tmp_path):
    model = tiny_model()
    bias = 14.0 + torch.rand(16)
    model.layers[1].mlp.selection_bias.copy_(bias)
    model.bfloat16()
    assert torch.equal(model.layers[1].mlp.selection_bias, bias)
    hf.write(tmp_path / "out", model.config, model.state_dict(), tokenizer_dir=None)
    back = load_model(tmp_path / "out", dtype=torch.bfloat16)
    assert back.embed.weight.dtype == torch.bfloat16
    assert torch.equal(back.layers[1].mlp.selection_bias, bias)
