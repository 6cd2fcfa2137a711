import mmap

import pytest
import torch

from gristmill.models import device as dev
from gristmill.util.errors import UserError

CPU = torch.device("cpu")


def test_auto_is_a_device_that_computes():
    found = dev.choose_device("auto")
    assert torch.ones(2, device=found).sum().item() == 2


def test_absent_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no cuda device here.*available:.*cpu.*--device auto"):
        dev.choose_device("cuda")
    with pytest.raises(UserError, match="unknown device \\(tpu\\)"):
        dev.choose_device("tpu")


def test_one_of_several_devices_is_named_by_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert dev.choose_device("cuda:1") == torch.device("cuda", 1)
    assert dev.choose_device("cuda") == torch.device("cuda", 0)
    with pytest.raises(UserError, match="no cuda:2 here \\(of 2"):
        dev.choose_device("cuda:2")
    for wrong in ("cpu:1", "cuda:", "cuda:first"):
        with pytest.raises(UserError, match="unknown device"):
            dev.choose_device(wrong)


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ({"amx_bf16": True}, "bf16-mixed"),
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"bf16": True}, "bf16-mixed"),
        ({"avx512_f": True, "amx_tile": True}, "32-true"),
        ({}, "32-true"),
    ],
)
def test_auto_precision_follows_the_processor(monkeypatch, flags, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert dev.resolve_precision("auto", CPU) == precision
    inference = dev.resolve_precision("auto", CPU, bf16="bf16-true")
    assert inference == precision.replace("mixed", "true")


def test_typed_precision_is_honoured(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert dev.resolve_precision("bf16-true", CPU) == "bf16-true"
    assert "emulated" in dev.describe(CPU, "bf16-true")
    with pytest.raises(UserError, match="unknown precision \\(16-true\\)"):
        dev.resolve_precision("16-true", CPU)


def test_dtypes_of_precisions():
    assert dev.weight_dtype("bf16-mixed") is torch.float32
    assert dev.compute_dtype("bf16-mixed") is torch.bfloat16
    assert dev.weight_dtype("bf16-true") is dev.compute_dtype("bf16-true") is torch.bfloat16
    assert dev.weight_dtype("32-true") is dev.compute_dtype("32-true") is torch.float32


def test_peak_is_a_plausible_rate():
    assert 1e9 < dev.peak_flops(CPU, "32-true") < 1e15


def test_peak_is_none_when_the_product_fails(monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(dev, "_timed_product", fail)
    assert dev.peak_flops(CPU, "32-true") is None


def test_memory_grows_with_what_is_held():
    before = dev.memory_bytes(CPU)
    size = 64 * 2**20
    with mmap.mmap(-1, size) as held:
        for page in range(0, size, 4096):
            held[page] = 1
        during = dev.memory_bytes(CPU)
    assert during.current - before.current > size // 2
    assert dev.memory_bytes(CPU).peak > before.current + size // 2  # counters lag by some pages
