from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from gristmill.checkpoint import store
from gristmill.checkpoint.load import load, newest_good
from gristmill.checkpoint.save import Checkpointer
from gristmill.checkpoint.staging import Staging
from gristmill.util.errors import RunError, UserError

from .conftest import build, same_state, train


def save(out_dir, config, step, pair, record=None, last=False, **options):
    checkpointer = Checkpointer(out_dir, config=config, **options)
    checkpointer.save(step, *pair, record or {}, last=last)
    checkpointer.wait()
    assert not checkpointer.failed
    return store.step_path(out_dir, step)


@pytest.mark.parametrize("fused", [True, False])
def test_five_steps_save_load_five_steps_equal_ten(tmp_path, config, fused):
    whole, first = build(1, fused=fused), build(1, fused=fused)
    train(*whole, range(10))
    train(*first, range(5))
    path = save(tmp_path, config, 5, first, {"samples": 20, "nested": {"a": [1, 2.5, None]}})

    second = build(2, fused=fused)
    train(*second, range(50, 52))  # state of its own, to be replaced
    record = load(path, *second)
    assert same_state(first, second)
    assert second[0].head.weight is second[0].embed.weight
    train(*second, range(5, 10))
    assert same_state(whole, second)
    assert record["samples"] == 20
    assert record["nested"] == {"a": [1, 2.5, None]}
    assert record["step"] == 5


def test_the_last_save_writes_the_same_files_without_a_copy(tmp_path, config, trained, monkeypatch):
    copied = save(tmp_path / "copied", config, 3, trained)
    monkeypatch.setattr(Staging, "copy", lambda *_: pytest.fail("a copy was made"))
    last = save(tmp_path / "last", config, 3, trained, last=True)
    for file in sorted(p.relative_to(copied) for p in copied.rglob("*.safetensors")):
        assert (last / file).read_bytes() == (copied / file).read_bytes()
    other = build(2)
    load(last, *other)
    assert same_state(trained, other)


def test_bf16_and_state_before_the_first_step(tmp_path, config):
    pair = build(1)
    pair[0].to(torch.bfloat16)
    path = save(tmp_path, config, 0, pair)
    assert not (path / "optimizer").exists()
    other = build(2)
    other[0].to(torch.bfloat16)
    load(path, *other)
    assert same_state(pair, other)


def test_weights_alone_leave_the_optimizer(tmp_path, config, trained):
    path = save(tmp_path, config, 3, trained)
    model, optimizer = build(2)
    load(path, model)
    assert torch.equal(model.mix.weight, trained[0].mix.weight)
    assert not optimizer.state


def test_layout_and_record(tmp_path, config, trained):
    tokenizer = tmp_path / "tok"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "model.safetensors").write_text("weights of somebody")
    path = save(tmp_path / "run", config, 7, trained, tokenizer_dir=tokenizer)
    names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
    shard = "shard-00001-model-00001-of-00001.safetensors"
    assert names == [
        "checkpoint.json",
        "config.json",
        f"optimizer/{shard}",
        "tokenizer/tokenizer.json",
        f"weights/{shard}",
    ]
    assert set(store.read_record(path)["files"]) == set(names) - {"checkpoint.json"}
    written = json.loads((path / "config.json").read_text())
    assert written["gristmill"] == 1
    assert written["hidden_size"] == 8
    # Any safetensors reader finds our names; the shared weight is there once.
    weights = load_file(path / "weights" / shard)
    assert set(weights) == {
        "embed.weight",
        "norm.weight",
        "norm.bias",
        "mix.weight",
        "mix.bias",
        "scale",
    }
    moments = load_file(path / "optimizer" / shard)
    assert moments["mix.bias.step"].item() == 3


def test_staged_copy_is_not_disturbed_by_training(tmp_path, config, trained):
    kept = build(9)
    for mine, theirs in zip(kept[0].parameters(), trained[0].parameters()):
        mine.data.copy_(theirs.data)
    checkpointer = Checkpointer(tmp_path, config=config)
    for step in (3, 4):  # the second save goes into the buffers of the first
        checkpointer.save(step, *trained, {})
        train(*trained, [step])
    checkpointer.wait()
    first = build(2)
    load(store.step_path(tmp_path, 3), first[0])
    assert torch.equal(first[0].embed.weight, kept[0].embed.weight)
    second = build(2)
    load(store.step_path(tmp_path, 4), second[0])
    assert not torch.equal(second[0].embed.weight, first[0].embed.weight)
    assert not torch.equal(second[0].embed.weight, trained[0].embed.weight)


def test_record_is_copied_at_save(tmp_path, config, trained):
    record = {"samples": 1}
    checkpointer = Checkpointer(tmp_path, config=config)
    checkpointer.save(1, *trained, record)
    record["samples"] = 2
    checkpointer.wait()
    assert store.read_record(store.step_path(tmp_path, 1))["samples"] == 1


def test_other_shape_precision_and_optimizer_are_refused(tmp_path, config, trained):
    path = save(tmp_path, config, 3, trained)
    before = build(2)[0]
    wide = build(2, width=16)
    with pytest.raises(UserError, match=r"embed.weight as \[16, 8\] float32, not \[16, 16\]"):
        load(path, *wide)
    with pytest.raises(UserError, match="not .* bfloat16"):
        load(path, build(2)[0].to(torch.bfloat16))
    extra = build(2)[0]
    extra.more = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"lacks more.bias, more.weight"):
        load(path, extra)
    sgd_model = build(2)[0]
    sgd = torch.optim.SGD(sgd_model.parameters(), lr=0.1)
    with pytest.raises(UserError, match="optimizer AdamW, this run uses SGD"):
        load(path, sgd_model, sgd)
    assert torch.equal(sgd_model.mix.weight, before.mix.weight)  # refused before anything is read


def test_state_of_an_untrained_parameter_is_refused(tmp_path, config, trained):
    path = save(tmp_path, config, 3, trained)
    model = build(2)[0]
    some = torch.optim.AdamW(model.mix.parameters(), lr=1e-2, fused=True)
    with pytest.raises(UserError, match="embed.weight, norm.bias, norm.weight, which"):
        load(path, model, some)


def test_hyperparameters_stay_the_configuration_s(tmp_path, config, trained):
    path = save(tmp_path, config, 3, trained)
    model, optimizer = build(2)
    optimizer.param_groups[0].update(lr=0.5, peak_lr=0.7)
    load(path, model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["peak_lr"] == 0.7


def flip_byte(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("part", ["weights", "optimizer", "config.json", "checkpoint.json"])
def test_a_flipped_bit_is_found_and_the_one_before_is_used(tmp_path, config, trained, part, capsys):
    older = save(tmp_path, config, 3, trained)
    newer = save(tmp_path, config, 4, trained)
    assert newest_good(tmp_path) == newer
    assert not capsys.readouterr().err
    file = newer / part
    flip_byte(next(file.iterdir()) if file.is_dir() else file, -3)
    assert newest_good(tmp_path) == older
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "step-00000004 is not used" in lines[0]
    assert part in lines[0]
    with pytest.raises(RunError, match="damaged"):
        load(newer, *build(2))


def test_none_truncated_missing_and_all_damaged(tmp_path, config, trained):
    assert newest_good(tmp_path / "nothing") is None
    first = save(tmp_path, config, 3, trained)
    second = save(tmp_path, config, 4, trained)
    weights = next((first / "weights").iterdir())
    weights.write_bytes(weights.read_bytes()[:-1])
    next((second / "optimizer").iterdir()).unlink()
    with pytest.raises(RunError) as error:
        newest_good(tmp_path)
    assert "step-00000003/weights" in str(error.value)
    assert "step-00000004/optimizer" in str(error.value)
    assert "bytes instead of" in str(error.value)


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(RunError, match=r"no checkpoint.json"):
        load(tmp_path, *build(2))
