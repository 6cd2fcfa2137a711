"""Our decoder against `transformers`: numbers, files in both directions, text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gristmill.formats import hf
from gristmill.formats.model_dir import load_model, read_config
from gristmill.models.cache import KVCache
from gristmill.tokenizer.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    # Large enough that a wrong sign or order shows.
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "llama-tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-scaled": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "neox-parallel": ("GPTNeoX", {"use_parallel_residual": True}),
    "neox-sequential": (
        "GPTNeoX",
        {
            "use_parallel_residual": False,
            "rope_parameters": {"rope_theta": 5e3, "partial_rotary_factor": 0.5},
        },
    ),
    "neox-tied": ("GPTNeoX", {"tie_word_embeddings": True}),
    "neox-no-bias": ("GPTNeoX", {"attention_bias": False}),
}


@pytest.fixture(params=MODELS)
def pair(request, tmp_path: Path):
    """A random model of transformers, its directory, and our decoder loaded from there."""
    kind, options = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**TINY, **options)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms start at 0 and 1
            parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, tmp_path / "theirs", load_model(tmp_path / "theirs")


def tokens_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 96, (3, 40), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    targets[1, 10:20] = -100
    return tokens, targets


def test_logits_loss_and_gradients(pair):
    theirs, _, ours = pair
    tokens, targets = tokens_and_targets()
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens), expected, atol=1e-5, rtol=1e-5)
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum")
    count = (targets != -100).sum()
    (loss / count).backward()
    mine = ours(tokens, targets) / count
    mine.backward()
    torch.testing.assert_close(mine, loss / count, atol=1e-5, rtol=1e-5)
    # Their gradients in our names: save them as if they were weights.
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for parameter in theirs.parameters():
        parameter.data.copy_(parameter.grad)
    assert gradients
    return_dir = pair[1].with_name("gradients")
    theirs.save_pretrained(return_dir)
    expected_gradients = dict(load_model(return_dir).named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected_gradients[name], atol=1e-5, rtol=1e-5, msg=name
        )


def test_our_directory_loads_there_and_is_bitwise_the_same(pair, tmp_path):
    theirs, source, ours = pair
    hf.write(tmp_path / "ours", ours.config, ours.state_dict(), tokenizer_dir=None)
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    assert back.dtype is torch.float32
    expected, found = theirs.state_dict(), back.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    tokens, _ = tokens_and_targets()
    assert torch.equal(back(tokens).logits, theirs(tokens).logits)
    torch.testing.assert_close(back(tokens).logits, ours(tokens), atol=1e-5, rtol=1e-5)


def test_config_json_means_the_same_both_ways(pair, tmp_path):
    theirs, source, ours = pair
    hf.write(tmp_path / "ours", ours.config, ours.state_dict(), tokenizer_dir=None)
    assert read_config(tmp_path / "ours") == read_config(source) == ours.config
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "ours").to_dict()
    expected = theirs.config.to_dict()
    told = set(json.loads((tmp_path / "ours" / "config.json").read_text()))
    assert "rope_parameters" in expected
    for key in {"rope_parameters", "architectures"} | (told & expected.keys()):
        if key not in ("dtype", "torch_dtype", "bos_token_id", "eos_token_id"):
            assert loaded[key] == expected[key], key


def test_half_precision_and_shards_load_there(pair, tmp_path):
    _, _, ours = pair
    hf.write(
        tmp_path / "ours",
        ours.config,
        ours.state_dict(),
        tokenizer_dir=None,
        dtype=torch.bfloat16,
        max_shard_bytes=10_000,
    )
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert back.dtype is torch.bfloat16
    ours.bfloat16()
    reloaded = load_model(tmp_path / "ours", dtype=torch.bfloat16)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, dict(reloaded.named_parameters())[name]), name
    tokens, _ = tokens_and_targets()
    torch.testing.assert_close(back(tokens).logits, ours(tokens), atol=0.3, rtol=0.1)


@pytest.fixture(scope="module")
def stories(shared) -> Path:
    path = shared / "data" / "models" / "stories260K" / "hf"
    if not path.is_dir():
        pytest.skip("no stories260K")
    return path


def test_trained_model_writes_its_golden_text(stories):
    model, tokenizer = load_model(stories), Tokenizer.load(stories)
    golden = (stories.parent / "golden_greedy_80.txt").read_text(encoding="utf-8")
    ids, cached = [tokenizer.bos_id], [tokenizer.bos_id]
    cache = KVCache(model.config, 1, 100)
    with torch.no_grad():
        for _ in range(80):
            ids.append(int(model(torch.tensor([ids]), num_logits=1).argmax()))
            cached.append(int(model(torch.tensor([cached[-1:]]), cache=cache).argmax()))
    assert cached == ids
    assert tokenizer.decode(ids) == golden.rstrip("\n")


def test_trained_model_goes_round_through_our_directory(stories, tmp_path):
    model = load_model(stories)
    hf.write(tmp_path / "final", model.config, model.state_dict(), tokenizer_dir=stories)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    tokens = torch.arange(3, 43).view(2, 20)
    torch.testing.assert_close(back(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "final")
    text = "Once upon a time, Lily’s dog  ran."
    ours = Tokenizer.load(tmp_path / "final")
    assert tokenizer(text)["input_ids"] == ours.encode(text, bos=True)
    golden = (stories.parent / "golden_greedy_80.txt").read_text(encoding="utf-8")
    written = back.generate(torch.tensor([[1]]), max_new_tokens=80, do_sample=False)[0]
    assert tokenizer.decode(written, skip_special_tokens=True).strip() == golden.strip()


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_tokenizer_files_load_there(shared, tmp_path, name):
    """Whatever the architecture: a byte-level tokenizer beside a model of another family."""
    source = shared / "data" / "tokenizers" / name
    if not source.is_dir():
        pytest.skip(f"no {name} tokenizer")
    from gristmill.models import zoo
    from gristmill.models.decoder import Decoder
    from gristmill.models.init import init_weights

    config = zoo.get("gristmill-nano")
    model = Decoder(config)
    init_weights(model, 0)
    hf.write(tmp_path / "final", config, model.state_dict(), tokenizer_dir=source)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "final")
    ours = Tokenizer.load(source)
    text = "def f(x):\n    return x**2  # naïve   Σ\t🙂\r\n"
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert theirs.eos_token_id == ours.eos_id
    assert read_config(tmp_path / "final").eos_token_id == ours.eos_id
