"""The copy in `--out_dir`: what it must not be written over."""

import shutil
from dataclasses import replace

import pytest

from gristmill.formats.model_dir import load_model, open_model_dir
from gristmill.measure.copy import copy_model
from gristmill.util.errors import UserError

from .models import write_model


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path)


@pytest.mark.parametrize("replace_other", [True, False])
def test_what_the_copy_is_made_of_stays(model, tmp_path, replace_other):
    here = open_model_dir(model)
    linked = tmp_path / "linked"
    linked.symlink_to(model, target_is_directory=True)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for source in (
        replace(here, kind="litgpt"),  # a checkpoint's own directory
        replace(here, kind="gguf", path=model / "model.safetensors"),  # one file in it
        replace(here, kind="checkpoint", path=tmp_path),  # its folder of weights
        replace(here, kind="peft", path=adapter, base=here),
    ):
        for out in (model, linked):
            with pytest.raises(UserError, match="which the copy is made of"):
                copy_model(source, str(out), replace_other=replace_other)
    assert load_model(model)


def test_weights_behind_links_stay(model, tmp_path):
    view = tmp_path / "view"
    shutil.copytree(model, view)
    for file in view.glob("*.safetensors"):
        file.unlink()
        file.symlink_to(model / file.name)
    with pytest.raises(UserError, match="which the copy is made of"):
        copy_model(open_model_dir(view), str(model), replace_other=True)
    copy_model(open_model_dir(view), str(view), replace_other=True)  # it is this model already
    assert load_model(view)
