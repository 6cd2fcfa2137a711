"""Windows of steps, and that nothing is watched outside of one."""

import contextlib
import gzip
import json

import pytest
import torch

from gristmill.train import profile
from gristmill.train.profile import Profile, section, window
from gristmill.util.errors import UserError


@pytest.mark.parametrize(
    ("typed", "start", "total", "found"),
    [
        (False, 0, 100, None),
        ("false", 0, 100, None),
        (True, 0, 100, (11, 15)),
        (True, 20, 100, (31, 35)),
        (True, 0, 3, (1, 3)),
        (True, 98, 100, (99, 100)),
        (True, 100, 100, None),
        ("20:25", 0, 100, (20, 25)),
        ("20:25", 22, 100, (23, 25)),
        ("20:25", 0, 22, (20, 22)),
        ("20:25", 30, 100, None),
    ],
)
def test_windows(typed, start, total, found):
    assert window(typed, start_step=start, total_steps=total) == found


@pytest.mark.parametrize("typed", ["20", "a:b", "20:", ":5", "9:3", "0:3", "-1:3"])
def test_what_is_no_window_is_refused(typed):
    with pytest.raises(UserError, match="--profile"):
        window(typed, start_step=0, total_steps=100)


def test_parts_of_the_steps_in_the_window_only(tmp_path):
    weight = torch.ones(8, 8, requires_grad=True)
    watcher = Profile(3, 4, tmp_path, torch.device("cpu"))
    lines = []
    for step in range(1, 7):
        watcher.before_step(step)
        assert (profile._active is watcher) == (step in (3, 4))
        with section("forward"):
            loss = (weight @ weight).sum()
            with section("inner"):
                pass
        with section("backward"):
            loss.backward()
        lines += watcher.after_step(step)
    assert isinstance(section("forward"), contextlib.nullcontext)
    text = "\n".join(lines)
    assert "profile of 2 steps" in text
    assert "inner" not in text
    for name in ("forward", "backward", "other", "aten::mm"):
        assert f"  {name} " in text
    with gzip.open(tmp_path / "profile/steps-3-4.json.gz") as stream:
        names = {event.get("name") for event in json.load(stream)["traceEvents"]}
    assert {"gristmill/forward", "gristmill/backward", "aten::mm"} <= names


def test_a_run_that_ends_within_the_window_shows_what_there_is(tmp_path):
    watcher = Profile(3, 9, tmp_path, torch.device("cpu"))
    watcher.before_step(3)
    assert watcher.after_step(3) == []
    assert "profile of 1 steps" in watcher.finish(3)[0]
    assert watcher.finish(3) == []
    watcher.before_step(4)
    assert profile._active is None
