import struct
import sys
import weakref
from dataclasses import replace

import pytest
import torch

from gristmill.config.commands import TokenizerTrain
from gristmill.config.model import RopeScaling
from gristmill.formats import gguf
from gristmill.formats.compare import compare_config
from gristmill.formats.model_dir import load_model, open_model_dir, read_config
from gristmill.models import zoo
from gristmill.models.counts import parameter_shapes
from gristmill.models.zoo import gguf as table
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.tokenizer.train import train_bpe
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


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "tok"
    text = [*TEXTS, "the quick brown fox, 12 345 don't. " * 200]
    cfg = TokenizerTrain(
        out_dir=str(out), vocab_size=300, bos_token="<|bos|>", special_tokens=["<|user|>"]
    )
    train_bpe(text, cfg)
    (out / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (out / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return out


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


def test_rotary_scalings_come_back(tmp_path):
    for number, scaling in enumerate(
        (
            RopeScaling(kind="llama3", factor=8.0, original_max_seq_length=32),
            RopeScaling(kind="linear", factor=4.0),
            RopeScaling(kind="yarn", factor=4.0, original_max_seq_length=16),
        )
    ):
        config = small("Llama-2-7b-hf", rope_scaling=scaling)
        write(tmp_path / f"{number}.gguf", config)
        assert read_config(tmp_path / f"{number}.gguf").rope_scaling == scaling


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


# Tokenizers


def test_a_tokenizer_of_ours_goes_along(tmp_path, tokenizer_dir):
    config = small("Llama-2-7b-hf", vocab_size=320)
    write(tmp_path / "m.gguf", config, tokenizer_dir=tokenizer_dir)
    here, there = Tokenizer.load(tokenizer_dir), Tokenizer.load(tmp_path / "m.gguf")
    metadata = read_header(tmp_path / "m.gguf").metadata
    assert len(metadata["tokenizer.ggml.tokens"]) == 320
    assert metadata["tokenizer.ggml.pre"] == "smaug-bpe"  # Llama 3's splits, merges first
    assert metadata["tokenizer.ggml.eot_token_id"] == 2
    assert there.digest == here.digest
    assert (there.bos_id, there.eos_id, there.stop_ids) == (here.bos_id, here.eos_id, (1, 2))
    assert there.chat_template == here.chat_template
    assert there.adds_bos is here.adds_bos is True
    assert read_config(tmp_path).num_token_ids == here.num_token_ids


def test_the_words_of_llama_cpp_alone_make_the_same_tokenizer(tmp_path, tokenizer_dir, monkeypatch):
    from gristmill.tokenizer import gguf_vocabulary

    describe = gguf_vocabulary.describe

    def without_json(*arguments):
        words = describe(*arguments)
        del words["tokenizer.huggingface.json"]
        return words

    monkeypatch.setattr(gguf_vocabulary, "describe", without_json)
    write(tmp_path / "m.gguf", small("Llama-2-7b-hf", vocab_size=320), tokenizer_dir=tokenizer_dir)
    here, there = Tokenizer.load(tokenizer_dir), Tokenizer.load(tmp_path)
    assert there.digest != here.digest
    assert there.num_token_ids == here.num_token_ids
    assert set(there.special_tokens) == set(here.special_tokens)
    assert there.adds_bos
    for text in TEXTS:
        for special in (False, True):
            ids = here.encode(text, special=special)
            assert there.encode(text, special=special) == ids
        assert there.decode(here.encode(text)) == text


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_published_tokenizers(tmp_path, shared, name):
    folder = shared / "data/tokenizers" / name
    here = Tokenizer.load(folder)
    config = small("Llama-2-7b-hf", vocab_size=here.num_token_ids, hidden_size=8, num_heads=1)
    write(tmp_path / "m.gguf", replace(config, num_kv_heads=1), tokenizer_dir=folder)
    assert read_header(tmp_path / "m.gguf").metadata["tokenizer.ggml.pre"] == "gpt-2"
    there = Tokenizer.load(tmp_path / "m.gguf")
    assert all(there.encode(text) == here.encode(text) for text in TEXTS)


def test_sentencepiece_goes_along(tmp_path, shared):
    pytest.importorskip("sentencepiece")
    folder = shared / "data/models/stories260K/hf"
    source = open_model_dir(folder)
    gguf.write(
        tmp_path / "m.gguf",
        source.config,
        source.parameters(),
        tokenizer_dir=folder,
        dtype="float32",
    )
    here, there = Tokenizer.load(folder), Tokenizer.load(tmp_path / "m.gguf")
    assert there.kind == "sentencepiece"
    assert read_header(tmp_path / "m.gguf").metadata["tokenizer.ggml.model"] == "llama"
    assert (there.bos_id, there.eos_id, there.adds_bos) == (here.bos_id, here.eos_id, here.adds_bos)
    texts = [*TEXTS, "Once upon a time", " a", "a  b   c", "", "\n"]
    assert [there.encode(t) for t in texts] == [here.encode(t) for t in texts]
    assert [there.decode(here.encode(t)) for t in texts] == [
        here.decode(here.encode(t)) for t in texts
    ]
    assert read_config(tmp_path) == source.config


def test_a_directory_beside_the_file_wins(tmp_path, tokenizer_dir):
    write(tmp_path / "m.gguf", small("Llama-2-7b-hf", vocab_size=320), tokenizer_dir=tokenizer_dir)
    Tokenizer.load(tokenizer_dir).save(tmp_path)
    assert Tokenizer.load(tmp_path).path == tmp_path / "tokenizer.json"


def edit(path, tokenizer_dir, monkeypatch, **words):
    """A file with other words about its tokenizer; None takes one out."""
    from gristmill.tokenizer import gguf_vocabulary

    describe = gguf_vocabulary.describe

    def changed(*arguments):
        out = describe(*arguments) | {f"tokenizer.ggml.{key}": v for key, v in words.items()}
        out.pop("tokenizer.huggingface.json")
        return {key: value for key, value in out.items() if value is not None}

    with monkeypatch.context() as patch:
        patch.setattr(gguf_vocabulary, "describe", changed)
        write(path, small("Llama-2-7b-hf", vocab_size=320), tokenizer_dir=tokenizer_dir)


def test_unknown_splits(tmp_path, tokenizer_dir, monkeypatch):
    edit(tmp_path / "m.gguf", tokenizer_dir, monkeypatch, pre="of-tomorrow")
    with pytest.raises(UserError, match=r"m\.gguf parts text by the rules 'of-tomorrow'.*--tokeni"):
        Tokenizer.load(tmp_path / "m.gguf")
    assert load_model(tmp_path)  # the model itself is fine


@pytest.mark.parametrize("kind", ["bert", None])
def test_unknown_tokenizers(tmp_path, tokenizer_dir, monkeypatch, kind):
    edit(tmp_path / "m.gguf", tokenizer_dir, monkeypatch, model=kind)
    with pytest.raises(UserError, match=r"no tokenizer can be taken from.*--tokenizer_dir"):
        Tokenizer.load(tmp_path / "m.gguf")


def test_splits_that_llama_cpp_does_not_know(tmp_path, tokenizer_dir):
    import json

    raw = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+|\w+"
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"no word for how .*tokenizer\.json parts a text"):
        write(tmp_path / "m.gguf", small("Llama-2-7b-hf", vocab_size=320), tokenizer_dir=tmp_path)


def test_more_ids_than_rows(tmp_path, tokenizer_dir):
    with pytest.raises(UserError, match="300 ids, the model 96 rows"):
        write(tmp_path / "m.gguf", small("Llama-2-7b-hf"), tokenizer_dir=tokenizer_dir)


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


def test_several_files(written):
    written.with_name("n.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 GGUF files \(m\.gguf, n\.gguf\). Name one"):
        open_model_dir(written.parent)


def test_without_the_package(written, tmp_path, monkeypatch):
    write(tmp_path / "q.gguf", small("Llama-2-7b-hf"), "q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert load_model(written)  # 16 and 32 bits need none
    with pytest.raises(UserError, match=r"q\.gguf.*pip install 'gristmill\[gguf\]'"):
        load_model(tmp_path / "q.gguf")
    with pytest.raises(UserError, match=r"pip install 'gristmill\[gguf\]'"):
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
