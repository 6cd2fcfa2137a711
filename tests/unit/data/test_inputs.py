from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

import pytest

from gristmill.data.raw import inputs
from gristmill.data.raw.inputs import list_inputs, root_of
from gristmill.data.storage import Storage
from gristmill.util.errors import UserError


def put(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def paths(root: Path | str, pattern: str, **options) -> list[str]:
    return [item.path for item in list_inputs(root, pattern, **options)]


def put_remote(*names: str) -> str:
    """A URL with these files below it."""
    root = f"memory://{uuid.uuid4().hex}/data"
    for name in names:
        Storage(root).write(name, name.encode())
    return root


def test_patterns(tmp_path):
    put(tmp_path, "a.txt", "b.md", "x/c.txt", "x/y/d.txt", "x/y/e.TXT", "z[1].txt")
    assert paths(tmp_path, "**/*.txt") == ["a.txt", "x/c.txt", "x/y/d.txt", "z[1].txt"]
    assert paths(tmp_path, "*.txt") == ["a.txt", "z[1].txt"]
    assert paths(tmp_path, "x/*/?.txt") == ["x/y/d.txt"]
    assert paths(tmp_path, "x/**") == ["x/c.txt", "x/y/d.txt", "x/y/e.TXT"]
    assert paths(tmp_path, "**/[ab].*") == ["a.txt", "b.md"]
    assert paths(tmp_path, "**/y/*") == ["x/y/d.txt", "x/y/e.TXT"]
    assert len(paths(tmp_path, "**/*")) == 6
    put(tmp_path, "xyc.txt", "q?.txt")
    assert paths(tmp_path, "x?c.txt") == ["xyc.txt"]
    assert paths(tmp_path, "q[?].txt") == ["q?.txt"]


def test_a_single_file_needs_no_pattern(tmp_path):
    put(tmp_path, "notes.md", "other.txt")
    (found,) = list_inputs(tmp_path / "notes.md", "**/*.txt")
    assert (found.path, found.place, found.size) == ("notes.md", "notes.md", 8)
    assert found.version == str((tmp_path / "notes.md").stat().st_mtime_ns)
    assert root_of(tmp_path / "notes.md").path == root_of(tmp_path).path == tmp_path


def test_hidden_files_caches_and_the_output_are_left_out(tmp_path):
    names = ["a.txt", ".b.txt", f"{inputs.CACHE}/k/c.txt", "out/d.txt", "out2/e.txt"]
    names += ["data/tokenizer/merges.txt", "data/manifest.json", "data/index.json", "data/f.txt"]
    put(tmp_path, *names)
    wanted = ["a.txt", "out2/e.txt"]
    assert paths(tmp_path, "**/*.txt", exclude=[tmp_path / "out", "s3://elsewhere"]) == wanted
    root = put_remote(*names)
    assert paths(root, "**/*.txt", exclude=[f"{root}/out", tmp_path]) == wanted


def test_a_file_with_two_names_is_taken_once(tmp_path):
    put(tmp_path, "b/x.txt")
    (tmp_path / "a.txt").symlink_to(tmp_path / "b" / "x.txt")
    (tmp_path / "c").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    found = list_inputs(tmp_path, "**/*.txt")
    assert [item.path for item in found] == ["a.txt"]
    assert found[0].size == len("b/x.txt")


def test_a_folder_that_lies_elsewhere_is_followed(tmp_path):
    put(tmp_path / "elsewhere", "x/a.txt")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "other").symlink_to(tmp_path / "elsewhere")
    assert paths(tmp_path / "root", "**/*") == ["link/x/a.txt"]


def test_a_broken_link_is_named(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"a\.txt cannot be read \(No such file"):
        list_inputs(tmp_path, "*.txt")


def test_paths_are_sorted_by_their_normalised_bytes(tmp_path):
    put(tmp_path, "e\u0301.txt", "Z.txt", "a.txt", "é2.txt", "中.txt")
    assert paths(tmp_path, "*") == ["Z.txt", "a.txt", "\xe9.txt", "\xe92.txt", "中.txt"]
    # The place keeps the spelling of the disk.
    assert list_inputs(tmp_path, "*")[2].place == "e\u0301.txt"


@pytest.mark.parametrize("remote", [False, True])
def test_spellings_of_one_name_are_two_files(tmp_path, remote):
    names = ["\xe9.txt", "e\u0301.txt", "z.txt", "Z.txt"]
    put(tmp_path, *names)
    found = list_inputs(put_remote(*names) if remote else tmp_path, "*")
    assert [item.path for item in found] == ["Z.txt", "z.txt", "\xe9.txt", "\xe9.txt"]
    assert [item.place for item in found[2:]] == ["e\u0301.txt", "\xe9.txt"]


def test_an_empty_folder_says_what_is_there(tmp_path):
    put(tmp_path, "a.md", "b.md", "c.pdf")
    with pytest.raises(
        UserError, match=r"matches '\*\*/\*\.txt' \(there: 2 \.md, 1 \.pdf\).*\*\.md'"
    ):
        list_inputs(tmp_path, "**/*.txt")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"there are no files under .*none"):
        list_inputs(tmp_path / "none", "**/*.txt")
    with pytest.raises(UserError, match="there are no files under memory://"):
        list_inputs(f"memory://{uuid.uuid4().hex}", "**/*.txt")


def test_missing_and_unread_forms(tmp_path):
    with pytest.raises(UserError, match="there is no file or folder"):
        list_inputs(tmp_path / "nowhere", "*")
    put(tmp_path, "a.jsonl.bz2")
    with pytest.raises(UserError, match=r"form that is not read \(\.bz2\)"):
        list_inputs(tmp_path, "**/*.jsonl*")


def test_unreadable_folders_are_named(tmp_path, monkeypatch):
    put(tmp_path, "a.txt")

    def scandir(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"cannot read the folder .*\(Permission denied\).*chmod"):
        list_inputs(tmp_path, "**/*.txt")


def test_a_dataset_saved_by_hugging_face_is_its_arrow_files(tmp_path):
    names = ["dataset_dict.json"]
    for split in ("train", "test"):
        names += [f"{split}/{n}" for n in ("state.json", "dataset_info.json", "cache-1f.arrow")]
        names += [f"{split}/data-00000-of-00001.arrow"]
    put(tmp_path, *names, "other/info.json", "other/dataset_info.json")
    data = ["test/data-00000-of-00001.arrow", "train/data-00000-of-00001.arrow"]
    assert paths(tmp_path, "**/*.arrow") == data
    assert paths(put_remote(*names), "**/*") == data
    # A file of the user's that is only called so.
    assert paths(tmp_path, "**/*.json") == ["other/dataset_info.json", "other/info.json"]


def test_urls():
    root = put_remote("x/b.jsonl", "a.jsonl", "note.md", "x/.hidden.jsonl")
    found = list_inputs(root, "**/*.jsonl")
    assert [(i.path, i.place, i.size) for i in found] == [
        ("a.jsonl", "a.jsonl", 7),
        ("x/b.jsonl", "x/b.jsonl", 9),
    ]
    assert paths(f"{root}/", "*.jsonl") == ["a.jsonl"]
    assert paths(f"{root}/x/b.jsonl", "*") == ["b.jsonl"]
    assert root_of(f"{root}/x/b.jsonl").root == f"{root}/x"
    assert root_of(root).root == root
    with pytest.raises(UserError, match=r"no file under memory://.* \(there: 2 \.jsonl, 1 \.md\)"):
        list_inputs(root, "*.txt")


def test_a_store_that_refuses_is_named(monkeypatch):
    def refuse(self, name):
        raise PermissionError(13, "Access Denied")

    monkeypatch.setattr(Storage, "exists", refuse)
    with pytest.raises(UserError, match=r"s3://bucket/x cannot be read .*credentials"):
        list_inputs("s3://bucket/x", "*")


def test_versions_change_with_files(tmp_path):
    put(tmp_path, "a.txt")
    (before,) = list_inputs(tmp_path, "*")
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    (after,) = list_inputs(tmp_path, "*")
    assert before.version != after.version == "1"
    assert json.dumps([after.path, after.size]) == json.dumps([before.path, before.size])
