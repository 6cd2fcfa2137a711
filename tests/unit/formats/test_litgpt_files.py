"""LitGPT's checkpoints: every form they come in, what we write, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from gristmill.config.model import MixtureOfExperts, ModelConfig
from gristmill.formats import hf, litgpt
from gristmill.formats.layouts import to_theirs
from gristmill.formats.model_dir import load_model, open_model_dir
from gristmill.models import zoo
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights
from gristmill.models.zoo import litgpt_weights
from gristmill.models.zoo.litgpt import parse, words
from gristmill.util.errors import UserError

TINY = replace(
    zoo.get("tiny-llama-1.1b"),
    name="tiny",
    vocab_size=64,
    max_seq_length=32,
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    bos_token_id=None,
    eos_token_id=None,
)
TOKENS = torch.tensor([[3, 9, 27, 1, 60, 12, 12, 5]])


def model_of(config: ModelConfig = TINY, seed: int = 0) -> Decoder:
    model = Decoder(config)
    init_weights(model, seed)
    return model.eval()


def write(out: Path, config: ModelConfig = TINY, **options) -> Path:
    litgpt.write(out, config, model_of(config).state_dict(), tokenizer_dir=None, **options)
    return out


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(folder / "lit_model.pth", weights_only=True))


def check(place: Path, config: ModelConfig = TINY) -> None:
    """The model at `place` is the one that `write` writes."""
    source = open_model_dir(place)
    assert source.kind == "litgpt"
    assert source.config == config
    wanted = model_of(config).state_dict()
    found = dict(source.parameters())
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    again = open_model_dir(source.path)
    assert torch.equal(again.parameters()["embed.weight"], wanted["embed.weight"])


def test_what_is_written_is_read(tmp_path):
    out = write(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out"]
    files = ["config.json", "generation_config.json", "lit_model.pth", "model_config.yaml"]
    assert sorted(os.listdir(out)) == files
    settings = yaml.safe_load((out / "model_config.yaml").read_text())
    assert len(settings) == 51
    assert settings["padded_vocab_size"] == settings["vocab_size"] == 64
    state = state_of(out)
    assert list(state)[0] == "transformer.wte.weight"
    assert state["transformer.h.1.attn.qkv.weight"].shape == (64, 32)
    assert state["lm_head.weight"].is_contiguous()
    check(out)


@pytest.mark.parametrize("name", ["pythia-14m", "SmolLM2-135M", "Qwen2.5-0.5B"])
def test_biases_and_tied_matrices(tmp_path, name):
    shape = {"vocab_size": 50, "num_layers": 2, "hidden_size": 48, "intermediate_size": 40}
    heads = {"num_heads": 6, "num_kv_heads": None if name == "pythia-14m" else 3}
    ids = {"num_token_ids": 47, "bos_token_id": 1, "eos_token_id": (2, 5)}
    config = replace(zoo.get(name), **shape, **heads, **ids)
    check(write(tmp_path / "out", config), config)


def test_a_tied_matrix_is_stored_once(tmp_path):
    write(tmp_path / "one", replace(TINY, tie_embeddings=True))
    write(tmp_path / "two", TINY)
    sizes = [(tmp_path / n / "lit_model.pth").stat().st_size for n in ("one", "two")]
    assert sizes[1] - sizes[0] >= 64 * 32 * 4
    assert {"lm_head.weight", "transformer.wte.weight"} <= set(state_of(tmp_path / "one"))


def test_dtype_of_the_file_and_of_what_chooses_experts(tmp_path):
    moe = MixtureOfExperts(
        num_experts=4,
        intermediate_size=16,
        score="sigmoid",
        selection_bias=True,
        num_groups=2,
        group_score="top2",
    )
    config = replace(TINY, moe=moe)
    out = write(tmp_path / "out", config, dtype=torch.bfloat16)
    state = state_of(out)
    assert {k for k, v in state.items() if v.dtype != torch.bfloat16} == {
        f"transformer.h.{layer}.mlp.gate.e_score_correction_bias" for layer in range(2)
    }
    assert parse(words(config)).moe == moe


class Counting(Mapping):
    """Parameters made when asked for; knows how many were alive at once."""

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        self.parameters, self.alive, self.most = parameters, 0, 0

    def __getitem__(self, name: str) -> torch.Tensor:
        value = self.parameters[name].clone()
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(value, self.drop)
        return value

    def drop(self) -> None:
        self.alive -= 1

    def __iter__(self):
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    tensors = Counting(model_of(replace(TINY, num_layers=6)).state_dict())
    litgpt.write(tmp_path / "o", replace(TINY, num_layers=6), tensors, tokenizer_dir=None)
    assert tensors.most <= 4  # query, key and value lie in one; and the one before


def legacy(state: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """The table with query, key and value group by group, as until 2024."""
    rows = (config.num_heads * config.head_size, *[config.kv_heads * config.head_size] * 2)
    out = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            (value,) = to_theirs("groups", value.split(rows), config)
        out[name.replace(".attn.qkv.", ".attn.attn.")] = value
    return out


def shard(folder: Path, content: dict) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(content, checkpoint_id=folder, no_dist=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "form",
    [
        "flat",
        "model",
        "compiled",
        "legacy",
        "old zip",
        "sharded",
        "sharded itself",
        "consolidated",
        "consolidated itself",
        "run",
        "newest step",
        "bare file",
        "lit_config.json",
        "iter",
    ],
)
def test_every_form_of_a_checkpoint(tmp_path, form):
    out = write(tmp_path / "out")
    path, state = out / "lit_model.pth", state_of(out)
    training = {"model": state, "optimizer": {"state": {0: torch.ones(3)}}, "iter_num": 3}
    place = out
    if form in ("model", "run", "newest step"):
        torch.save(training, path)
    if form == "compiled":
        torch.save(training | {"model": {f"_orig_mod.{k}": v for k, v in state.items()}}, path)
    if form == "legacy":
        torch.save(legacy(state, TINY), path)
    if form == "old zip":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    if form.startswith(("sharded", "consolidated")):
        path.unlink()
    if form.startswith("sharded"):
        shard(path, training | {"model": {f"_orig_mod.{k}": v for k, v in state.items()}})
        place = path if form == "sharded itself" else out
    if form.startswith("consolidated"):
        file = out / "lit_model.pth.consolidated"
        torch.save({"state_dict": state, "iter_num": 3}, file)
        place = file if form == "consolidated itself" else out
    if form == "run":
        place = out.rename(tmp_path / "final").parent
    if form == "newest step":
        for step in ("step-00000900", "step-00001000"):
            shutil.copytree(out, tmp_path / "run" / step)
        torch.save({"damaged": 1}, tmp_path / "run" / "step-00000900" / "lit_model.pth")
        place = tmp_path / "run"
    if form == "bare file":
        place = path.rename(out / "step-00060500.pth")
    if form == "lit_config.json":
        settings = yaml.safe_load((out / "model_config.yaml").read_text())
        settings["_norm_class"] = settings.pop("norm_class_name")
        settings["_mlp_class"] = settings.pop("mlp_class_name")
        settings["condense_ratio"] = settings.pop("rope_condense_ratio")
        (out / "lit_config.json").write_text(json.dumps(settings | {"org": "Lightning-AI"}))
        (out / "model_config.yaml").unlink()
    if form == "iter":
        path.rename(out / "iter-000100-ckpt.pth")
        torch.save({"damaged": 1}, out / "iter-000099-ckpt.pth")
        (out / "config.json").unlink()
    check(place)


def test_the_configuration_of_the_tokenizer_is_not_the_model_s(tmp_path):
    out = write(tmp_path / "out")
    donor = zoo.family("llama").to_hf_config(replace(zoo.get("tiny-llama-1.1b"), bos_token_id=7))
    (out / "config.json").write_text(json.dumps(donor))
    (out / "generation_config.json").unlink()
    assert open_model_dir(out).config == replace(TINY, bos_token_id=7, eos_token_id=2)
    assert load_model(out)(TOKENS).shape == (1, 8, 64)
    # Somebody's tool would build the donor from it.
    note = litgpt.donor_note(open_model_dir(out))
    assert "of another model (LlamaForCausalLM, 22 layers)" in note
    (out / "config.json").write_text('{"model_type": "bert"}')
    assert "no model that is known" in litgpt.donor_note(open_model_dir(out))
    write(tmp_path / "own")
    assert litgpt.donor_note(open_model_dir(tmp_path / "own")) is None


def test_on_to_hugging_face(tmp_path):
    source = open_model_dir(write(tmp_path / "lit"))
    hf.write(tmp_path / "hf", source.config, source.parameters(), tokenizer_dir=None)
    there = load_model(tmp_path / "hf")
    assert torch.equal(there(TOKENS), model_of()(TOKENS))


def test_names_of_other_training_code(tmp_path):
    out = write(tmp_path / "out")
    swiglu = {"fc_1": "swiglu.w1", "fc_2": "swiglu.w2", "mlp.proj": "mlp.swiglu.w3"}
    state = {}
    for name, value in legacy(state_of(out), TINY).items():
        for ours, theirs in swiglu.items():
            name = name.replace(ours, theirs)
        state[name] = value
    torch.save({"model": state}, out / "lit_model.pth")
    check(out)


def lit_llama_logits(state: dict[str, torch.Tensor], heads: int) -> torch.Tensor:
    """What lit-llama computes: neighbours rotate, as in the paper (arXiv:2104.09864)."""

    def norm(x, name):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * state[f"{name}.scale"]

    def rotate(x):
        angles = torch.outer(torch.arange(x.shape[1]), 10000.0 ** -(torch.arange(0, 8, 2) / 8))
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        turned = turned * torch.polar(torch.ones_like(angles), angles)[None, :, None]
        return torch.view_as_real(turned).flatten(-2)

    x = F.embedding(TOKENS, state["transformer.wte.weight"])
    for layer in range(2):
        part = f"transformer.h.{layer}"
        fused = norm(x, f"{part}.rms_1") @ state[f"{part}.attn.c_attn.weight"].T
        q, k, v = (t.unflatten(-1, (heads, 8)) for t in fused.chunk(3, -1))
        q, k, v = (t.transpose(1, 2) for t in (rotate(q), rotate(k), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + y @ state[f"{part}.attn.c_proj.weight"].T
        h = norm(x, f"{part}.rms_2")
        gate, up = (h @ state[f"{part}.mlp.c_fc{n}.weight"].T for n in (1, 2))
        x = x + (F.silu(gate) * up) @ state[f"{part}.mlp.c_proj.weight"].T
    return norm(x, "transformer.ln_f") @ state["lm_head.weight"].T


def lit_llama_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"lm_head.weight": (64, 32), "transformer.wte.weight": (64, 32)}
    shapes["transformer.ln_f.scale"] = (32,)
    for layer in range(2):
        part = f"transformer.h.{layer}"
        shapes |= {f"{part}.rms_1.scale": (32,), f"{part}.rms_2.scale": (32,)}
        shapes |= {f"{part}.attn.c_attn.weight": (96, 32), f"{part}.attn.c_proj.weight": (32, 32)}
        shapes |= {f"{part}.mlp.c_fc{n}.weight": (48, 32) for n in (1, 2)}
        shapes[f"{part}.mlp.c_proj.weight"] = (32, 48)
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def test_lit_llama_files(tmp_path, monkeypatch):
    state = lit_llama_state()
    torch.save({"model": state}, tmp_path / "iter-015999-ckpt.pth")
    with pytest.raises(UserError, match=r"comes without its configuration\. Put the model_config"):
        open_model_dir(tmp_path / "iter-015999-ckpt.pth")
    monkeypatch.setitem(litgpt_weights.LLAMA_HEADS, (2, 32), 4)
    for place in (tmp_path, tmp_path / "iter-015999-ckpt.pth"):
        assert open_model_dir(place).config.family == "llama"
        logits = load_model(place)(TOKENS).detach()
        torch.testing.assert_close(logits, lit_llama_logits(state, 4), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("layers", "hidden", "inner", "billions"),
    [(32, 4096, 11008, 6.7), (40, 5120, 13824, 13), (60, 6656, 17920, 32.5), (80, 8192, 22016, 65)],
)
def test_sizes_that_shapes_name(layers, hidden, inner, billions):
    from gristmill.models.counts import num_parameters

    config = litgpt_weights.config_from_shapes(layers, 32000, hidden, inner)
    assert config.head_size == 128
    assert num_parameters(config) / 1e9 == pytest.approx(billions, rel=0.01)
    assert litgpt_weights.config_from_shapes(layers + 1, 32000, hidden, inner) is None


def test_a_directory_named_after_a_model_needs_no_configuration(tmp_path):
    config = replace(zoo.get("pythia-14m"), vocab_size=80, bos_token_id=None, eos_token_id=None)
    out = write(tmp_path / "pythia-14m", config)
    for name in ("model_config.yaml", "generation_config.json", "config.json"):
        (out / name).unlink()
    found = open_model_dir(out).config
    assert (found.vocab_size, found.num_layers) == (80, config.num_layers)


# Faults.


def test_wrong_tensors_are_named(tmp_path):
    out = write(tmp_path / "out")
    state, name = state_of(out), "transformer.h.1.mlp.fc_2.weight"
    torch.save({**state, name: torch.ones(3, 32)}, out / "lit_model.pth")
    with pytest.raises(UserError, match=rf"lit_model.pth: tensor {name} is \[3, 32\].*\[48, 32\]"):
        load_model(out)
    torch.save({k: v for k, v in state.items() if k != name}, out / "lit_model.pth")
    with pytest.raises(UserError, match=f"1 of 17 tensors are missing, the first is {name}"):
        load_model(out)
    torch.save({**state, "transformer.h.0.lora_A": torch.ones(1)}, out / "lit_model.pth")
    with pytest.raises(UserError, match=r"lit_model.pth: tensor transformer.h.0.lora_A has no"):
        load_model(out)
    torch.save({"weight": torch.ones(1)}, out / "lit_model.pth")
    with pytest.raises(UserError, match=r"no tensor transformer.wte.weight \(it has weight\)"):
        load_model(out)


def test_damage_is_told(tmp_path):
    out = write(tmp_path / "out")
    file = out / "lit_model.pth"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"lit_model.pth cannot be read .*Fetch or copy"):
        load_model(out)
    write(out)
    settings = out / "model_config.yaml"
    text = settings.read_text()
    for bad, told in {
        "a: [": r"model_config.yaml is damaged",
        "- 1": r"model_config.yaml is damaged \(no table of settings\)",
        text + "new_switch: 3\n": r"model_config.yaml: new_switch is 3, which is not supported",
        text.replace("LLaMAMLP", "Other"): r"mlp_class_name is 'Other'\. Supported: GptNeoxMLP",
        text.replace("n_embd: 32", "n_embd: wide"): r"model_config.yaml has a value that makes no",
        "!!python/object/apply:os.system ['exit 1']": r"model_config.yaml is damaged",
    }.items():
        settings.write_text(bad)
        with pytest.raises(UserError, match=told):
            load_model(out)
    settings.unlink()
    with pytest.raises(UserError, match=r"comes without its configuration\. Put the model_config"):
        load_model(out)


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_is_not_run(tmp_path):
    out = write(tmp_path / "out")
    torch.save({"model": state_of(out), "hparams": Exploit(tmp_path / "trap")}, out / "x.pth")
    (out / "x.pth").rename(out / "lit_model.pth")
    with pytest.raises(UserError, match=r"holds more than tensors.*\(posix.system\)"):
        load_model(out)
    assert not (tmp_path / "trap").exists()


def test_other_directories_are_left_to_others(tmp_path):
    assert litgpt.find(tmp_path) is None
    assert litgpt.find(tmp_path / "nothing") is None
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert litgpt.find(tmp_path) is None
    assert litgpt.find(tmp_path / "model.safetensors") is None


def test_nothing_is_written_of_what_litgpt_cannot_express(tmp_path):
    config = replace(TINY, embedding_norm=True)
    with pytest.raises(UserError, match="LitGPT cannot express embedding_norm=True"):
        litgpt.write(tmp_path / "out", config, model_of().state_dict(), tokenizer_dir=None)
    assert not list(tmp_path.iterdir())
