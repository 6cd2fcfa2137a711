"""What a preparation that stopped has left, for its own command and for others."""

from __future__ import annotations

import sys

import pytest

from gristmill.config.data_commands import DataImport
from gristmill.data import prepare
from gristmill.data.look.find import is_dataset
from gristmill.data.preparation import finalize
from gristmill.data.store import adopt
from gristmill.data.store.dataset import Dataset
from gristmill.util.errors import UserError


def test_other_code_in_the_function_of_the_user_is_another_job(
    run_prepare, novels, tmp_path, monkeypatch
):
    def code(body):
        (tmp_path / "own_map.py").write_text(f"def clean(texts):\n    return {body}\n")
        sys.modules.pop("own_map", None)

    def stop(*_):
        raise RuntimeError("stopped")

    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "out"
    code("texts")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "finalize", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            run_prepare("textfiles", novels, out, map="own_map:clean")
    code("[text.upper() for text in texts]")
    with pytest.raises(UserError, match=r"unfinished work of another job: other code of --map\."):
        run_prepare("textfiles", novels, out, map="own_map:clean")
    code("texts")
    run_prepare("textfiles", novels, out, map="own_map:clean")
    code("[text.upper() for text in texts]")
    with pytest.raises(UserError, match=r"the dataset of another job: other code of --map\."):
        run_prepare("textfiles", novels, out, map="own_map:clean")


def test_a_side_without_its_manifest_is_no_dataset_of_another_tool(
    run_prepare, records, tmp_path, monkeypatch
):
    def stop(_):
        raise RuntimeError("stopped")

    out = tmp_path / "out"
    monkeypatch.setattr(finalize.manifest, "to_json", stop)  # what is written last
    with pytest.raises(RuntimeError, match="stopped"):
        run_prepare("jsonl", records, out, val_fraction=0.2)
    assert (out / "val" / "index.json").is_file()
    with pytest.raises(UserError, match=r"val is not finished. run the `gristmill prepare` com"):
        Dataset.open(out / "val")
    assert not is_dataset(out / "val")
    with pytest.raises(UserError, match="is not finished"):
        adopt.run(DataImport(input_dir=str(out / "val")))
