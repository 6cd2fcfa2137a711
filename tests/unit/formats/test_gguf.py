import random
import struct
import sys
import weakref
from dataclasses import replace

import pytest
import torch

from gristmill.config.model import RopeScaling
from gristmill.formats import gguf
from gristmill.formats.compare import compare_config
from gristmill.formats.model_dir import load_model, open_model_dir, read_config
from gristmill.models import zoo
from gristmill.models.counts import parameter_shapes
from gristmill.models.zoo import gguf as table
from gristmill.util.errors import UserError
from gristmill.util.gguf_header import read_header

SMALL = {
    "vocab_size": 96,
    "max_seq_length": 64,
    "num_layers": 2,
    "hidden_size": 64,
    "num_heads": 4,
    "intermediate_size": 96,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPS = {"num_kv_heads": 2}
# Named model -> architecture of llama.cpp, and what makes it small besides `SMALL`.
MODELS = {
    "Llama-2-7b-hf": ("llama", GROUPS),
    "Llama-3.2-1B": ("llama", GROUPS | {"max_seq_length": 131072}),
    "Mistral-7B-v0.3": ("llama", GROUPS),
    "Mistral-7B-v0.1": ("llama", GROUPS),
    "SmolLM3-3B": ("smollm3", GROUPS | {"num_layers": 4}),
    "Qwen2.5-0.5B": ("qwen2", GROUPS),
    "Qwen3-0.6B": ("qwen3", GROUPS | {"head_dim": 32}),
    "Gemma-2b": ("gemma", {"head_dim": 32, "embedding_scale": 8.0}),
    "Gemma-2-2b": (
        "gemma2",
        GROUPS | {"head_dim": 32, "attention_scale": None, "embedding_scale": 8.0},
    ),
    "Gemma-3-4b-it": (
        "gemma3",
        GROUPS | {"head_dim": 32, "attention_scale": None, "embedding_scale": 8.0, "num_layers": 7},
    ),
    "phi-2": ("phi2", {"rope_fraction": 0.5}),
    "phi-4": ("phi3", GROUPS),
    "gpt2": ("gpt2", {}),
    "pythia-14m": ("gptneox", {}),
    "falcon-7b": ("falcon", {}),
    "falcon-40b": ("falcon", {"num_kv_heads": 2}),
    "stablelm-3b-4e1t": ("stablelm", {}),
    "OLMo-7B-hf": ("olmo", {}),
    "OLMo-2-0425-1B": ("olmo2", {}),
    "starcoder2-3b": ("starcoder2", GROUPS | {"sliding_window": None}),
}
TEXTS = [
    "Hello world! 123456",
    "  two spaces\n\n\ttab, it's I'LL\r\n",
    "Größe, 你好，世界 🙂 x̂",
    "def f(x): return x**2  # don't",
    "<|bos|>hi<|user|>",
]


def small(name, **changes):
    _, options = MODELS[name]
    return replace(zoo.get(name), **{**SMALL, **options, **changes})


def random_weights(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = parameter_shapes(config)
    return {n: torch.randn(shape, generator=generator) * 0.3 for n, shape in shapes.items()}


def write(path, config, dtype="float32", tokenizer_dir=None, weights=None):
    weights = random_weights(config) if weights is None else weights
    gguf.write(path, config, weights, tokenizer_dir=tokenizer_dir, dtype=dtype)
    return weights


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_reads_back_bit_for_bit(tmp_path, name):
    config = small(name)
    weights = write(tmp_path / "m.gguf", config)
    source = open_model_dir(tmp_path / "m.gguf")
    assert source.kind == "gguf"
    row = table.architecture(read_header(source.path).metadata)
    assert row.name == MODELS[name][0]
    compare_config(config, source.config)
    parameters = source.parameters()
    assert set(parameters) == set(weights)
    for parameter, value in weights.items():
        assert torch.equal(parameters[parameter], value), parameter


def test_every_architecture_is_covered():
    moe = {"qwen3moe"}  # below
    assert {row for row, _ in MODELS.values()} | moe == set(table.ARCHITECTURES)


@pytest.mark.parametrize(
    ("name", "row"), [("Mixtral-8x7B-v0.1", "llama"), ("Qwen3-30B-A3B", "qwen3moe")]
)
def test_experts(tmp_path, name, row):
    config = zoo.get(name)
    moe = replace(config.moe, num_experts=4, num_experts_per_token=2, intermediate_size=32)
    options = {**SMALL, **GROUPS, "moe": moe, "intermediate_size": 32, "sliding_window": None}
    config = replace(config, **options)
    weights = write(tmp_path / "m.gguf", config)
    source = open_model_dir(tmp_path / "m.gguf")
    assert read_header(source.path).metadata["general.architecture"] == row
    assert source.config == replace(config, head_dim=source.config.head_dim)
    parameters = source.parameters()
    assert all(torch.equal(parameters[n], v) for n, v in weights.items())


@pytest.mark.slow
def test_named_models_can_be_written_or_say_why_not():
    told = []
    for name, model in zoo.models().items():
        config = model.config
        family = zoo.family(config.family)

        def shapes(row, config=config):
            from gristmill.formats.source import TheirTensors

            return TheirTensors(row.table_for(config), config, {}).shapes

        try:
            table.row_for(config, family.architecture, shapes)
        except UserError:
            told.append(name)
    assert not [
        n for n in told if n.startswith(("Llama", "Qwen", "Gemma", "pythia", "gpt2", "Smol"))
    ]
    assert "Mistral-7B-v0.1" in told  # llama.cpp has no sliding window there
    assert len(told) < len(zoo.models()) / 4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_types(tmp_path, dtype):
    config = small("gpt2")
    weights = write(tmp_path / "m.gguf", config, dtype)
    kinds = {name: info.type for name, info in read_header(tmp_path / "m.gguf").tensors.items()}
    assert kinds["blk.0.attn_qkv.weight"] == {"float16": 1, "bfloat16": 30, "q8_0": 8}[dtype]
    assert kinds["blk.0.attn_norm.weight"] == kinds["position_embd.weight"] == 0
    parameters = open_model_dir(tmp_path / "m.gguf").parameters()
    for name, value in weights.items():
        read = parameters[name]
        if dtype == "q8_0" and value.dim() > 1:
            step = value.abs().amax() / 127
            assert (read - value).abs().max() <= 0.52 * step, name
        elif read.dtype == torch.float32:
            assert torch.equal(read, value), name
        else:
            assert torch.equal(read, value.to(getattr(torch, dtype))), name


def test_short_rows_are_16_bits_in_q8_0(tmp_path):
    config = small("Llama-2-7b-hf", intermediate_size=72)
    write(tmp_path / "m.gguf", config, "q8_0")
    tensors = read_header(tmp_path / "m.gguf").tensors
    assert tensors["blk.0.ffn_down.weight"].type == 1
    assert tensors["blk.0.ffn_up.weight"].type == 8


def test_the_decoder_computes_the_same(tmp_path):
    config = small("Gemma-3-4b-it")
    write(tmp_path / "m.gguf", config)
    model = load_model(tmp_path)
    ids = torch.arange(20)[None]
    expected = load_model(tmp_path / "m.gguf")
    assert torch.equal(model(ids), expected(ids))
    assert model.training is False


def test_a_head_that_is_a_copy_of_the_embedding_is_tied(tmp_path, monkeypatch):
    config = small("gpt2", tie_embeddings=False)
    weights = random_weights(config)
    write(tmp_path / "apart.gguf", config, weights=weights)
    assert not read_config(tmp_path / "apart.gguf").tie_embeddings
    weights["head.weight"] = weights["embed.weight"]
    write(tmp_path / "ours.gguf", config, weights=weights)
    assert not read_config(tmp_path / "ours.gguf").tie_embeddings  # ours say what they mean
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "_UNTIED", "somebody.elses")
        write(tmp_path / "copy.gguf", config, weights=weights)
    assert read_config(tmp_path / "copy.gguf").tie_embeddings
    ids = torch.arange(9)[None]
    tied = load_model(tmp_path / "copy.gguf")
    write(tmp_path / "tied.gguf", small("gpt2"), weights=dict(tied.state_dict()))
    assert torch.equal(tied(ids), load_model(tmp_path / "tied.gguf")(ids))


@pytest.mark.parametrize(
    ("name", "scaling"),
    [
        ("Llama-2-7b-hf", RopeScaling(factor=8.0, original_max_seq_length=32)),
        ("Llama-2-7b-hf", RopeScaling(kind="linear", factor=4.0)),
        ("Llama-2-7b-hf", RopeScaling(kind="yarn", factor=4.0, original_max_seq_length=16)),
        ("phi-4", {"short_factors": (1.0, 1.1) * 4, "long_factors": (1.5, 20.25) * 4}),
        (
            "phi-4",
            {"short_factors": (1.0,) * 8, "long_factors": (2.0,) * 8, "attention_factor": 1.25},
        ),
    ],
)
def test_rotary_scalings_come_back(tmp_path, name, scaling):
    if isinstance(scaling, dict):
        scaling = RopeScaling(kind="longrope", factor=4.0, original_max_seq_length=16, **scaling)
    write(tmp_path / "m.gguf", small(name, rope_scaling=scaling))
    assert read_config(tmp_path / "m.gguf").rope_scaling == scaling
    assert load_model(tmp_path)


def test_a_window_as_long_as_the_context_does_no_harm(tmp_path):
    config = small("Mistral-7B-v0.1", sliding_window=64)
    write(tmp_path / "m.gguf", config)
    assert read_config(tmp_path).sliding_window == 64


def test_one_tensor_is_held_at_a_time(tmp_path):
    config = small("Llama-2-7b-hf", num_layers=6)
    alive = weakref.WeakSet()
    most = 0

    class Lazy(dict):
        def __getitem__(self, name):
            nonlocal most
            tensor = torch.zeros(parameter_shapes(config)[name])
            alive.add(tensor)
            most = max(most, len(alive))
            return tensor

    gguf.write(tmp_path / "m.gguf", config, Lazy(), tokenizer_dir=None, dtype="float16")
    assert most <= 2


def test_nothing_is_left_when_writing_fails(tmp_path):
    config = small("Llama-2-7b-hf")

    class Broken(dict):
        def __getitem__(self, name):
            raise UserError("no such tensor")

    with pytest.raises(UserError, match="no such tensor"):
        gguf.write(tmp_path / "m.gguf", config, Broken(), tokenizer_dir=None)
    assert list(tmp_path.glob("*.gguf*")) == list(tmp_path.glob(".*.partial")) == []


# Faults


@pytest.fixture
def written(tmp_path):
    write(tmp_path / "m.gguf", small("Llama-2-7b-hf"))
    return tmp_path / "m.gguf"


def test_cut_off_in_the_tensors(written):
    data = written.read_bytes()
    last = max(read_header(written).tensors.values(), key=lambda t: t.offset)
    written.write_bytes(data[: last.offset + 100])
    with pytest.raises(UserError, match=rf"m\.gguf: tensor {last.name} is cut off"):
        load_model(written)


@pytest.mark.parametrize("length", [10, 40, 200, 600, 1500])
def test_cut_off_in_the_head(written, length):
    written.write_bytes(written.read_bytes()[:length])
    with pytest.raises(
        UserError, match=r"m\.gguf is (no GGUF file|cut off or damaged in its head)"
    ):
        open_model_dir(written)


def test_every_cut_of_the_head_is_a_user_error(written, tmp_path):
    head = min(t.offset for t in read_header(written).tensors.values())
    data = written.read_bytes()
    for length in range(24, head - 32, 97):
        cut = tmp_path / f"{length}.gguf"
        cut.write_bytes(data[:length])
        with pytest.raises(UserError, match=rf"{length}\.gguf"):
            open_model_dir(cut)
        cut.unlink()


def test_bytes_that_changed_are_a_user_error(written, tmp_path):
    """Whatever a bit of the head becomes: a model, or words about the file."""
    head = min(t.offset for t in read_header(written).tensors.values())
    data = written.read_bytes()
    rng = random.Random(0)
    told = 0
    for number in range(150):
        changed = bytearray(data)
        changed[rng.randrange(24, head)] = rng.choice([0, 1, 255, rng.randrange(256)])
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(changed)
        try:
            open_model_dir(path).tensors()
        except UserError:
            told += 1
        path.unlink()
    assert told > 20


def replace_bytes(path, old, new):
    data = path.read_bytes()
    assert data.count(old) >= 1
    assert len(old) == len(new)
    path.write_bytes(data.replace(old, new))


def test_no_gguf_at_all(written):
    replace_bytes(written, b"GGUF", b"GGML")
    with pytest.raises(UserError, match="is no GGUF file"):
        open_model_dir(written)


def test_another_version(written):
    data = bytearray(written.read_bytes())
    data[4:8] = struct.pack(">I", 3)
    written.write_bytes(data)
    with pytest.raises(UserError, match="big-endian"):
        open_model_dir(written)


def test_unknown_architecture(written):
    replace_bytes(written, b"llama", b"mamba")
    with pytest.raises(
        UserError, match=r"m\.gguf: GGUF architecture 'mamba' is not supported.*gpt2"
    ):
        open_model_dir(written)


def test_a_key_that_is_missing(written):
    replace_bytes(written, b"llama.context_length", b"llama.context_lengtX")
    with pytest.raises(UserError, match=r"m\.gguf: llama\.context_length is missing"):
        open_model_dir(written)


def test_a_tensor_that_is_missing(written):
    replace_bytes(written, b"blk.1.ffn_down.weight", b"blk.1.ffn_dowX.weight")
    with pytest.raises(UserError, match=r"m\.gguf.*first is blk\.1\.ffn_down\.weight"):
        load_model(written)


def test_a_tensor_too_many(written):
    replace_bytes(written, b"blk.1.", b"blk.2.")
    with pytest.raises(UserError, match=r"m\.gguf.*blk\.1\..*"):
        load_model(written)


def test_types_that_cannot_be_read(written):
    info = read_header(written).tensors["blk.0.attn_q.weight"]
    data = bytearray(written.read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 2 * 8
    assert struct.unpack_from("<I", data, at)[0] == info.type == 0
    for number, message in ((24, "of the type I8"), (999, "unknown type 999")):
        struct.pack_into("<I", data, at, number)
        written.write_bytes(data)
        with pytest.raises(UserError, match=rf"m\.gguf: tensor blk\.0\.attn_q\.weight .*{message}"):
            load_model(written)


def test_scales_without_a_field(written):
    replace_bytes(written, b"llama.vocab_size", b"llama.logit_scale"[:16])
    metadata = {**read_header(written).metadata, "llama.logit_scale": 0.5}
    row = table.architecture(metadata)
    shapes = {n: t.shape for n, t in read_header(written).tensors.items()}
    with pytest.raises(UserError, match=r"llama\.logit_scale is 0\.5, which is not supported"):
        table.parse(row, metadata, shapes, dict.__getitem__)


def test_other_files_beside_it(written):
    (written.parent / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert open_model_dir(written.parent).kind == "gguf"  # as repositories of GGUF files are
    (written.parent / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"config\.json"):
        open_model_dir(written.parent)
    assert open_model_dir(written).kind == "gguf"


def test_several_files(written):
    written.with_name("n.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 GGUF files \(m\.gguf, n\.gguf\). Name one"):
        open_model_dir(written.parent)


def test_without_the_package(written, tmp_path, monkeypatch):
    write(tmp_path / "q.gguf", small("Llama-2-7b-hf"), "q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert load_model(written)  # 16 and 32 bits need none
    with pytest.raises(UserError, match=r"q\.gguf.*pip install .*\[gguf\]"):
        load_model(tmp_path / "q.gguf")
    with pytest.raises(UserError, match=r"pip install .*\[gguf\]"):
        write(tmp_path / "o.gguf", small("Llama-2-7b-hf"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Llama-2-7b-hf", {"sliding_window": 8}, "sliding_window=8"),
        ("Llama-2-7b-hf", {"logit_softcap": 3.0, "activation": "gelu"}, "activation=gelu"),
        ("pythia-14m", {"tie_embeddings": True}, "tie_embeddings=True"),
    ],
)
def test_models_that_llama_cpp_has_no_words_for(tmp_path, name, changes, message):
    with pytest.raises(UserError, match=rf"{message}.*--format hf.*convert_hf_to_gguf\.py"):
        write(tmp_path / "m.gguf", small(name, **changes))
