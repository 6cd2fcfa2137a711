"""What is told of a directory that is written to meanwhile."""

import os

from gristmill.infer.identify import identify


def test_files_that_vanish_are_not_counted(base_model, monkeypatch):
    before = identify(base_model)
    assert before.num_files == len(list(base_model.rglob("*")))
    walk = os.walk

    def with_ghost(place):
        for folder, folders, names in walk(place):
            yield folder, folders, ["vanished.tmp", *names]

    monkeypatch.setattr(os, "walk", with_ghost)
    after = identify(base_model)
    assert (after.num_files, after.num_bytes) == (before.num_files, before.num_bytes)
