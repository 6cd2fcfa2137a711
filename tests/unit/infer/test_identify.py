"""What is told of a directory that is written to meanwhile."""

import os
import shutil

from gristmill.infer.identify import identify


def test_files_that_vanish_stop_nothing(base_model, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(base_model, model)
    before = identify(model)
    assert before.num_files == len(list(model.iterdir()))
    passing = model / "passing.tmp"
    passing.write_text("x")
    stat, walk = os.stat, os.walk

    def looked_at_once(path, *more, **settings):
        found = stat(path, *more, **settings)
        if os.fspath(path) == str(passing):
            passing.unlink()
        return found

    def with_ghost(place):
        for folder, folders, names in walk(place):
            yield folder, folders, ["vanished.tmp", *names]

    monkeypatch.setattr(os, "stat", looked_at_once)
    monkeypatch.setattr(os, "walk", with_ghost)
    assert identify(model).num_files <= before.num_files + 1
    after = identify(model)
    assert (after.num_files, after.num_bytes) == (before.num_files, before.num_bytes)
