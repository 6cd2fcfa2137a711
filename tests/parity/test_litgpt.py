"""LitGPT reads what we write, and we read what it writes: the same logits in both directions.

LitGPT 0.5.13 lives in an environment of its own: GRISTMILL_LITGPT_PYTHON names its interpreter.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import peers
import pytest
import torch

from gristmill.formats import hf, litgpt
from gristmill.formats.model_dir import load_model, open_model_dir
from gristmill.models import zoo
from gristmill.models.zoo.litgpt import parse, words

TOKENS = torch.tensor([[7, 1, 90, 33, 2, 2, 64, 11, 5, 100, 3, 49, 8, 71, 12, 0]])
SMALL = {
    "n_layer": 3,
    "n_embd": 32,
    "n_head": 4,
    "n_query_groups": 4,
    "sliding_window_indices": None,
    "rope_indices": None,
    "intermediate_size": 48,
    "block_size": 64,
    "vocab_size": 110,
    "padding_multiple": 64,
    "padded_vocab_size": None,
}
GROUPED = {"n_query_groups": 2}
HEADS = {"head_size": 16, "n_query_groups": 2}
EXPERTS = {"n_expert": 4, "n_expert_per_token": 2, **GROUPED}
WINDOW = {"sliding_window_size": 5}
LATENT = {
    "name": "latent",
    "mlp_class_name": "LLaMAMoE",
    "norm_class_name": "RMSNorm",
    "norm_eps": 1e-6,
    "bias": False,
    "parallel_residual": False,
    "rotary_percentage": 1.0,
    "n_expert": 8,
    "n_expert_per_token": 3,
    "n_expert_groups": 4,
    "n_topk_groups": 2,
    "n_topk_scores_per_group": 2,
    "n_shared_expert": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 12,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "latent_attention": {
        "q_lora_rank": 24,
        "kv_lora_rank": 20,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 16,
    },
}
# name of LitGPT's -> what is smaller; every switch of its decoder is in one of them.
CASES = {
    "tiny-llama-1.1b": GROUPED,
    "Llama-3.1-8B": GROUPED,
    "LLaMA-2-7B-32K": {},
    "pythia-14m": {},
    "stablelm-3b-4e1t": {},
    "falcon-7b": {"n_query_groups": 1},
    "falcon-40b": GROUPED,
    "phi-2": {"n_head": 2, "n_query_groups": 2},
    "Phi-3-mini-4k-instruct": WINDOW,
    "Gemma-2b": {"head_size": 16, "n_query_groups": 1},
    "Gemma-2-9b": {**HEADS, **WINDOW},
    "Gemma-3-1b-it": {**HEADS, **WINDOW, "n_layer": 7},
    "Gemma-3-4b-it": {**HEADS, **WINDOW, "n_layer": 7},
    "Mistral-7B-v0.1": {**GROUPED, **WINDOW},
    "Mixtral-8x7B-v0.1": EXPERTS,
    "Qwen2.5-0.5B": GROUPED,
    "Qwen3-0.6B-Base": HEADS,
    "Qwen3-30B-A3B": {**EXPERTS, **HEADS, "moe_intermediate_size": 12},
    "OLMo-1B-hf": {},
    "OLMo-2-1124-7B": {},
    "latent": LATENT,
    "latent-pairs": {**LATENT, "rope_interleave": True},
}
OWN = {"latent", "latent-pairs"}

# LitGPT's models, random, as its pretraining saves them; and its logits.
MAKE = """
import json, sys
from pathlib import Path
import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import save_config
root, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
tokens = torch.tensor(jobs.pop("tokens"))
for name, (known, options) in jobs.items():
    torch.manual_seed(0)
    config = Config.from_name(name, **options) if known else Config(**options)
    model = GPT(config)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape) * 0.1 + (value.dim() == 1))
        for key, value in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                value.copy_(torch.rand(value.shape))
    folder = root / name
    folder.mkdir()
    save_config(config, folder)
    state = {"_orig_mod." + key: value for key, value in model.state_dict().items()}
    extra = {"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "iter_num": 3}
    torch.save({"model": state, **extra, "step_count": 3}, folder / "lit_model.pth")
    with torch.no_grad():
        torch.save(model(tokens), folder / "logits.pt")
"""

# What LitGPT makes of directories of ours: its own loading, strict.
LOAD = """
import json, sys
from pathlib import Path
import torch
from litgpt.config import Config
from litgpt.model import GPT
root, names, tokens = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
for name in names:
    config = Config.from_file(root / name / "model_config.yaml")
    model = GPT(config)
    state = torch.load(root / name / "lit_model.pth", mmap=True, weights_only=True)
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        torch.save(model.float()(torch.tensor(tokens)), root / name / "logits.pt")
"""

# A pretraining run of LitGPT's own, compiled as there but without a compiler's work.
PRETRAIN = """
import sys
from pathlib import Path
import torch

if __name__ == "__main__":
    text, tokenizer, out = map(Path, sys.argv[1:4])
    compile_ = torch.compile
    torch.compile = lambda model, **_: compile_(model, backend="eager")
    import litgpt.pretrain as pretrain
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.config import Config
    from litgpt.data import TextFiles
    from litgpt.model import GPT
    from litgpt.scripts.convert_pretrained_checkpoint import convert_pretrained_checkpoint

    pretrain.save_hyperparameters = lambda *_, **__: None
    sizes = dict(n_layer=2, n_embd=16, n_head=2, intermediate_size=24, block_size=32)
    pretrain.setup(
        "pythia-14m",
        model_config=Config.from_name("pythia-14m", **sizes),
        out_dir=out,
        precision="32-true",
        data=TextFiles(text, num_workers=0),
        train=TrainArgs(
            save_interval=2, global_batch_size=2, micro_batch_size=2, max_tokens=256,
            lr_warmup_steps=1, max_norm=1.0, min_lr=1e-4,
        ),
        eval=EvalArgs(interval=100, max_iters=1, final_validation=False),
        tokenizer_dir=tokenizer,
        logger_name="csv",
        devices=1,
    )
    convert_pretrained_checkpoint(out / "final", out / "converted")
    model = GPT(Config.from_file(out / "converted" / "model_config.yaml"))
    model.load_state_dict(torch.load(out / "converted" / "lit_model.pth", weights_only=True))
    with torch.no_grad():
        torch.save(model(torch.arange(20).view(1, 20)), out / "logits.pt")
"""


@pytest.fixture(scope="module")
def peer():
    """Runs a script where LitGPT is."""
    return peers.peer("GRISTMILL_LITGPT_PYTHON", "import litgpt")


@pytest.fixture(scope="module")
def theirs(peer, tmp_path_factory) -> Path:
    """A directory of LitGPT's for every case, with its logits."""
    root = tmp_path_factory.mktemp("theirs")
    jobs = {name: (name not in OWN, {**SMALL, **options}) for name, options in CASES.items()}
    peer(root, MAKE, root, json.dumps({"tokens": TOKENS.tolist(), **jobs}))
    return root


@pytest.fixture(scope="module")
def ours(peer, theirs, tmp_path_factory) -> Path:
    """The same models, read by us and written by us for LitGPT, with its logits of these."""
    root = tmp_path_factory.mktemp("ours")
    for name in CASES:
        source = open_model_dir(theirs / name)
        litgpt.write(root / name, source.config, source.parameters(), tokenizer_dir=None)
    peer(root, LOAD, root, json.dumps(list(CASES)), json.dumps(TOKENS.tolist()))
    return root


@pytest.mark.parametrize("name", CASES)
def test_their_checkpoint_computes_here_what_it_does_there(theirs, name):
    logits = torch.load(theirs / name / "logits.pt", weights_only=True)
    assert logits.std() > 0.1
    model = load_model(theirs / name)
    assert open_model_dir(theirs / name).kind == "litgpt"
    assert zoo.family(model.config.family).expresses(model.config)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_our_directory_computes_there_what_it_does_here(theirs, ours, name):
    logits = torch.load(ours / name / "logits.pt", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(load_model(ours / name)(TOKENS), logits, atol=1e-5, rtol=1e-5)
    before = torch.load(theirs / name / "logits.pt", weights_only=True)
    torch.testing.assert_close(logits, before, atol=1e-5, rtol=1e-5)


def test_pretraining_of_theirs_goes_on_here(peer, shared, tmp_path):
    tokenizer = shared / "data" / "tokenizers" / "neox"
    if not tokenizer.is_dir():
        pytest.skip("no neox tokenizer")
    text = tmp_path / "text"
    text.mkdir()
    for number in range(3):
        lines = (f"the mill turned under a grey wheel while {n} sacks came" for n in range(300))
        (text / f"{number}.txt").write_text("\n".join(lines))
    # The tokenizer's donor leaves its configuration beside the weights of another model.
    donor = tmp_path / "donor"
    shutil.copytree(tokenizer, donor)
    hf_words = zoo.family("llama").to_hf_config(zoo.get("tiny-llama-1.1b"))
    (donor / "config.json").write_text(json.dumps(hf_words))
    out = tmp_path / "out"
    peer(tmp_path, PRETRAIN, text, donor, out)
    logits = torch.load(out / "logits.pt", weights_only=True)
    assert (out / "final" / "config.json").exists()
    for place in (out / "final", out / "converted", out, out / "final" / "lit_model.pth"):
        with torch.no_grad():
            model = load_model(place)
            torch.testing.assert_close(
                model(torch.arange(20).view(1, 20)), logits, atol=1e-5, rtol=1e-5
            )
    assert load_model(out / "step-00000002").config == model.config
    # On to Hugging Face, with the model's own configuration.
    source = open_model_dir(out / "final")
    hf.write(tmp_path / "hf", source.config, source.parameters(), tokenizer_dir=out / "final")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["hidden_size"] == 16


def test_a_tied_model_has_both_matrices_there(peer, tmp_path):
    from gristmill.models.decoder import Decoder
    from gristmill.models.init import init_weights

    config = replace(
        zoo.get("SmolLM2-135M"), num_layers=2, hidden_size=18, num_heads=9, num_kv_heads=3
    )
    config = replace(config, intermediate_size=32, vocab_size=128, max_seq_length=64)
    model = Decoder(config)
    init_weights(model, 0)
    litgpt.write(tmp_path / "tied", config, model.state_dict(), tokenizer_dir=None)
    peer(tmp_path, LOAD, tmp_path, json.dumps(["tied"]), json.dumps(TOKENS.tolist()))
    logits = torch.load(tmp_path / "tied" / "logits.pt", weights_only=True)
    torch.testing.assert_close(logits, model(TOKENS).detach(), atol=1e-5, rtol=1e-5)
    assert open_model_dir(tmp_path / "tied").config == config


def test_every_model_of_theirs_has_words_for_us(peer, tmp_path):
    script = """
import json, sys
from dataclasses import asdict
from litgpt.config import Config, configs
json.dump({c["name"]: asdict(Config(**c)) for c in configs}, open(sys.argv[1], "w"))
"""
    peer(tmp_path, script, tmp_path / "all.json")
    known = json.loads((tmp_path / "all.json").read_text())
    assert len(known) > 200
    for name, raw in known.items():
        config = zoo.family_for(parse(raw))
        again = words(config)
        assert set(again) == set(raw)
        assert zoo.family_for(parse(again)) == config, name
