import json
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gristmill.checkpoint.save import Checkpointer
from gristmill.config.commands import Convert, Export, TokenizerTrain
from gristmill.config.model import MixtureOfExperts, ModelConfig
from gristmill.data.tokenizer_command import main as train_tokenizer
from gristmill.formats import beside, compare
from gristmill.formats import export as command
from gristmill.formats.beside import beside as build_beside
from gristmill.formats.export import convert_from_litgpt, export
from gristmill.formats.model_dir import load_model
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights
from gristmill.tokenizer.prompt_styles import write_style
from gristmill.util.errors import RunError, UserError

CONFIG = ModelConfig(
    name="mill",
    vocab_size=320,
    num_token_ids=300,
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=64,
    max_seq_length=96,
)


def random_model(config: ModelConfig = CONFIG) -> Decoder:
    model = Decoder(config)
    init_weights(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text").mkdir()
    (folder / "text/a.txt").write_text("the mill turned and the water ran " * 50)
    out = folder / "tok"
    options = TokenizerTrain(input_dir=str(folder / "text"), out_dir=str(out), vocab_size=280)
    train_tokenizer(options)
    (out / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return out


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer) -> tuple[Path, Decoder]:
    """A run directory with one training checkpoint."""
    run = tmp_path_factory.mktemp("saved") / "run"
    model = random_model()
    optimizer = torch.optim.AdamW(model.parameters())
    checkpointer = Checkpointer(run, config=CONFIG, tokenizer_dir=tokenizer)
    checkpointer.save(7, model, optimizer, {"samples": 28, "tokens": 2688})
    checkpointer.wait()
    assert not checkpointer.failed
    return run, model


@pytest.fixture
def run(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "run"))


def to(run: Path, out: Path, **options) -> Path:
    export(Export(checkpoint_dir=str(run), output_dir=str(out), **options))
    return out


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_checkpoint_becomes_what_transformers_loads(run, saved, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = to(run, tmp_path / "hf")
    state = saved[1].state_dict()
    assert all(
        torch.equal(value, state[name]) for name, value in load_model(out).named_parameters()
    )
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits[..., :300], saved[1](ids), atol=1e-5, rtol=0)
    words = AutoTokenizer.from_pretrained(out)
    assert words.chat_template.startswith("{% for m")
    assert words.decode(words("the mill")["input_ids"]) == "the mill"
    said = capsys.readouterr().out
    assert f"gristmill chat {out}" in said
    assert "float32" in said
    assert "equal bit for bit" in said
    assert not hidden(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_once(run, saved, tmp_path, dtype):
    tensors = load_file(to(run, tmp_path / "hf", dtype=dtype) / "model.safetensors")
    expected = saved[1].state_dict()["norm.weight"].to(getattr(torch, dtype))
    assert torch.equal(tensors["model.norm.weight"], expected)
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == dtype


def test_shards_have_a_limit(run, tmp_path, saved):
    out = to(run, tmp_path / "hf", max_shard_size="50kB")
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert max(shard.stat().st_size for shard in shards) < 52_000
    state = saved[1].state_dict()
    assert all(
        torch.equal(value, state[name]) for name, value in load_model(out).named_parameters()
    )


def test_an_export_of_an_export_is_the_same(run, tmp_path):
    first = to(run, tmp_path / "one")
    second = to(first, tmp_path / "two")
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_prompt_style_goes_along_in_each_formats_own_way(run, tokenizer, tmp_path):
    styled = Path(shutil.copytree(tokenizer, tmp_path / "styled"))
    (styled / "chat_template.jinja").unlink()
    write_style(styled, "Alpaca")
    theirs = to(run, tmp_path / "theirs", format="litgpt", tokenizer_dir=str(styled))
    style = "class_path: litgpt.prompts.Alpaca\n"
    assert (theirs / "prompt_style.yaml").read_text() == style
    ours = to(theirs, tmp_path / "ours")
    assert "### Response:" in (ours / "chat_template.jinja").read_text()
    assert not (ours / "prompt_style.yaml").exists()
    again = to(ours, tmp_path / "again", format="litgpt")
    assert (again / "prompt_style.yaml").read_text() == style
    # The template of the run itself is none of theirs.
    assert not (to(run, tmp_path / "plain", format="litgpt") / "prompt_style.yaml").exists()


def test_a_tokenizer_may_be_given_or_absent(saved, tmp_path, tokenizer, capsys):
    bare = tmp_path / "bare"
    (bare / "weights").mkdir(parents=True)
    save_file(saved[1].state_dict(), bare / "weights/w.safetensors")
    (bare / "config.json").write_text(json.dumps({"gristmill": 1, **asdict(CONFIG)}))
    (bare / "checkpoint.json").write_text("{}")
    assert not (to(bare, tmp_path / "without") / "tokenizer.json").exists()
    assert "No tokenizer was found" in capsys.readouterr().err
    assert (to(bare, tmp_path / "with", tokenizer_dir=str(tokenizer)) / "tokenizer.json").exists()
    small = replace(CONFIG, vocab_size=270, num_token_ids=None)
    save_file(random_model(small).state_dict(), bare / "weights/w.safetensors")
    (bare / "config.json").write_text(json.dumps({"gristmill": 1, **asdict(small)}))
    with pytest.raises(UserError, match="has ids up to 279, the model 270 rows"):
        to(bare, tmp_path / "unfit", tokenizer_dir=str(tokenizer))


def test_an_empty_directory_is_taken_and_a_full_one_is_not(run, tmp_path):
    (tmp_path / "out").mkdir()
    out = to(run, tmp_path / "out", dtype="bfloat16")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="is there already") as refused:
        to(run, out)
    assert refused.value.fix == {"--overwrite": "true"}
    assert (out / "model.safetensors").read_bytes() == before
    (out / "stale.txt").write_text("")
    to(run, out, overwrite=True)
    assert (out / "model.safetensors").stat().st_size > len(before)
    assert not (out / "stale.txt").exists()
    assert not hidden(tmp_path)


def test_what_is_no_model_is_never_overwritten(run, saved, tmp_path):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers/thesis.tex").write_text("all of it")
    with pytest.raises(UserError, match="something other than a model"):
        to(run, tmp_path / "papers", overwrite=True)
    other = Path(shutil.copytree(saved[0], tmp_path / "other"))
    with pytest.raises(UserError, match="holds a run"):
        to(run, other, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        to(run, tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("place", ["run", "run/step-00000007", "run/../run", "."])
def test_never_onto_its_own_source(run, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is the model itself, or holds it"):
        to(run, Path(place), overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shard_size": "huge"}, "--max_shard_size huge is no size"),
        ({"max_shard_size": "0GB"}, "--max_shard_size 0GB is no size"),
        ({"dtype": "q8_0"}, "q8_0 is a type of GGUF files"),
        ({"tokenizer_dir": "absent"}, "no tokenizer at absent"),
    ],
)
def test_mistakes(run, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        to(run, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_name_of_a_gguf_file_is_not_taken_for_a_directory(run, tmp_path):
    with pytest.raises(UserError, match="name of a GGUF file, but --format is hf") as caught:
        to(run, tmp_path / "out.gguf")
    assert caught.value.fix == {"--format": "gguf"}
    assert not (tmp_path / "out.gguf").exists()


def test_commands_are_printed_as_a_shell_takes_them(run, saved, tmp_path, capsys):
    to(run, tmp_path / "my model")
    assert f"gristmill chat '{tmp_path}/my model'" in capsys.readouterr().out


def test_names_that_are_missing(tmp_path):
    with pytest.raises(UserError, match="Give both: gristmill export"):
        export(Export(checkpoint_dir="x"))
    with pytest.raises(UserError, match="Give both: gristmill convert_from_litgpt"):
        convert_from_litgpt(Convert())
    with pytest.raises(UserError, match="gristmill download org/absent"):
        to(Path("org/absent"), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5e9), ("500mb", 5e8), ("2GiB", 2**31), ("1_000", 1000), ("1e6", 1e6)]
)
def test_sizes(text, size):
    assert command._bytes(text) == size


def test_float16_refuses_what_it_cannot_hold(saved, tmp_path):
    model = random_model()
    with torch.no_grad():
        model.norm.weight[3] = 70_000.0
    bare = tmp_path / "bare"
    (bare / "weights").mkdir(parents=True)
    save_file(model.state_dict(), bare / "weights/w.safetensors")
    (bare / "config.json").write_text(json.dumps({"gristmill": 1, **asdict(CONFIG)}))
    (bare / "checkpoint.json").write_text("{}")
    with pytest.raises(UserError, match=r"norm.weight has values up to 7e\+04.*--dtype bfloat16"):
        to(bare, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    assert not hidden(tmp_path)


def test_a_full_disk_is_said_before_the_start(run, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda path: full)
    with pytest.raises(RunError, match="no space left"):
        to(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_half_is_left(run, tmp_path, monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(command, "compare_weights", fail)
    with pytest.raises(Exception, match="nothing is left|could not be written"):
        to(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("format", ["hf", "litgpt", "gguf"])
def test_a_disk_that_fills_up_is_that_of_the_place_named(run, tmp_path, monkeypatch, format):
    def fail(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(beside, "_sync_one", fail)
    with pytest.raises(RunError) as told:
        to(run, tmp_path / "out", format=format)
    said = f"{tmp_path / 'out'} could not be written (No space left on device). Free space"
    assert str(told.value).startswith(said)


def test_the_old_export_stays_when_the_new_one_fails(run, tmp_path, monkeypatch):
    out = to(run, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "compare_weights", fail)
    with pytest.raises(Exception, match="nothing is left"):
        to(run, out, overwrite=True, dtype="bfloat16")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_bit_that_flips_on_the_way_is_found(run, tmp_path, monkeypatch):
    write = command._write

    def flipped(job, place):
        write(job, place)
        file = place / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(command, "_write", flipped)
    with pytest.raises(RunError, match="what was written is not the model .*differs"):
        to(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_export_leaves_nothing_that_can_be_taken_for_one(run, tmp_path, sent):
    """Killed while it writes: no target; the next run clears what is hidden."""
    slow = (
        "import sys, time\n"
        "from gristmill.formats import source\n"
        "get = source.Parameters.__getitem__\n"
        "def slow(self, name):\n"
        "    print(name, flush=True)\n"
        "    time.sleep(0.2)\n"
        "    return get(self, name)\n"
        "source.Parameters.__getitem__ = slow\n"
        "from gristmill.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["export", str(run), str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for _ in range(5):
        process.stdout.readline()
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == (130 if sent == signal.SIGINT else -sent)
    assert not (tmp_path / "out").exists()
    assert bool(hidden(tmp_path)) == (sent == signal.SIGKILL)
    to(run, tmp_path / "out")
    assert not hidden(tmp_path)


def test_killed_between_two_renames_the_old_comes_back(tmp_path):
    out = tmp_path / "out"
    aside = tmp_path / ".out.partial/old/out"
    aside.mkdir(parents=True)
    (aside / "config.json").write_text("old")
    with pytest.raises(KeyError), build_beside(out):
        raise KeyError
    assert (out / "config.json").read_text() == "old"
    assert not hidden(tmp_path)


def test_two_exports_of_one_target(tmp_path):
    out = tmp_path / "out"
    refused = pytest.raises(UserError, match="another process writes")
    with build_beside(out), refused, build_beside(out):
        pass


# The comparison itself


def test_comparison_is_of_bits():
    a = {"w": torch.tensor([1.0, float("nan"), 0.0])}
    compare.compare_weights(a, {"w": a["w"].clone()}, torch.float32)
    for wrong in (torch.tensor([1.0, float("nan"), -0.0]), torch.tensor([1.0, float("nan")])):
        with pytest.raises(RunError, match="w differs"):
            compare.compare_weights(a, {"w": wrong}, torch.float32)
    with pytest.raises(RunError, match="on one side only"):
        compare.compare_weights(a, {}, torch.float32)


def test_comparison_of_rounded_weights():
    torch.manual_seed(0)
    weight = torch.randn(5, 64)
    blocks = weight.view(5, 2, 32)
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
    rounded = ((blocks / scale).round() * scale).view(5, 64)
    compare.compare_weights({"w": weight}, {"w": rounded}, torch.float32, rounded=True)
    rounded[2, 3] += scale[2, 0, 0]
    with pytest.raises(RunError, match="w differs"):
        compare.compare_weights({"w": weight}, {"w": rounded}, torch.float32, rounded=True)


def test_comparison_of_configurations():
    compare.compare_config(CONFIG, replace(CONFIG, name="other", num_token_ids=None))
    compare.compare_config(CONFIG, replace(CONFIG, norm_eps=float(torch.tensor(1e-5))))
    compare.compare_config(CONFIG, replace(CONFIG, head_dim=8))
    experts = MixtureOfExperts(num_experts=4, intermediate_size=8, balance_loss=0.01)
    mixture = replace(CONFIG, family="mixtral", moe=experts)
    compare.compare_config(mixture, replace(mixture, moe=replace(experts, balance_loss=0.0)))
    for field, other in (("num_experts_per_token", 1), ("scale", 2.0)):
        changed = replace(mixture, moe=replace(experts, **{field: other}))
        with pytest.raises(RunError, match=field):
            compare.compare_config(mixture, changed)
    with pytest.raises(RunError, match="rope_theta was"):
        compare.compare_config(CONFIG, replace(CONFIG, rope_theta=5e5))
    with pytest.raises(RunError, match="rms_norm_eps was"):
        compare.compare_config(CONFIG, replace(CONFIG, norm_eps=1e-6))
