from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

from gristmill.data.raw import layouts
from gristmill.util.errors import UserError

PAGES = Path(__file__).parents[3] / "docs" / "corpora"


@pytest.mark.parametrize(
    ("layout", "bos", "eos", "bos_id", "eos_id", "expected"),
    [
        ("textfiles", "auto", "auto", 1, 2, (1, None)),
        ("textfiles", "auto", "auto", None, 2, (None, 2)),
        ("textfiles", "auto", "auto", None, None, (None, None)),
        ("textfiles", "none", "auto", 1, 2, (None, 2)),
        ("textfiles", "auto", "none", 1, 2, (1, None)),
        ("textfiles", "auto", 7, 1, 2, (1, 7)),
        ("slimpajama", "auto", "auto", 1, 2, (None, 2)),
        ("slimpajama", "auto", "auto", 1, None, (1, None)),
        ("slimpajama", "auto", "auto", None, None, (None, None)),
        ("slimpajama", "auto", "none", 1, 2, (1, None)),
        ("slimpajama", "none", "auto", 1, 2, (None, 2)),
        ("slimpajama", 7, "auto", 1, 2, (7, 2)),
        ("jsonl", "auto", "auto", 1, 2, (1, 2)),
        ("jsonl", "auto", "auto", None, 2, (None, 2)),
        ("jsonl", "auto", "auto", 0, 0, (None, 0)),  # one token for both
        ("jsonl", "auto", "none", 1, 2, (1, None)),
        ("jsonl", "none", "none", 1, 2, (None, None)),
        ("jsonl", 5, 5, 1, 2, (5, 5)),
    ],
)
def test_what_frames_a_document(layout, bos, eos, bos_id, eos_id, expected):
    found = layouts.frame(
        layouts.get(layout), bos=bos, eos=eos, bos_id=bos_id, eos_id=eos_id, num_token_ids=9
    )
    assert (found.bos_id, found.eos_id) == expected


def test_a_corpus_keeps_the_frame_of_its_wellknown_preparation():
    found = {name: layouts.get(name).first for name in layouts.names()}
    assert found == {
        "textfiles": "bos",
        "jsonl": "both",
        "json": "both",
        "parquet": "both",
        "huggingface": "both",
        "fineweb": "bos",
        "slimpajama": "eos",
        "starcoder": "eos",
        "redpajama": "bos",
        "openwebtext": "eos",
        "tinystories": "bos",
    }


@pytest.mark.parametrize(("option", "value"), [("bos", 9), ("eos", -1)])
def test_an_id_must_be_the_tokenizers(option, value):
    options = {"bos": "auto", "eos": "auto"} | {option: value}
    with pytest.raises(UserError, match=rf"--{option} {value} is no id .*0 to 8"):
        layouts.frame(layouts.get("jsonl"), **options, bos_id=None, eos_id=None, num_token_ids=9)


def test_an_unknown_name_shows_the_nearest_and_the_list():
    with pytest.raises(UserError, match=r"'fineweb-edu' \(did you mean fineweb\?\).*prepare list"):
        layouts.get("fineweb-edu")
    with pytest.raises(UserError, match=r"unknown layout 'x'\. use one of: textfiles, jsonl"):
        layouts.get("x")


@pytest.mark.parametrize("name", layouts.names())
def test_every_layout_has_its_page(name):
    text = (PAGES / f"{name}.md").read_text()
    layout = layouts.get(name)
    assert f"gristmill prepare {name}" in text
    assert layout.fetch in text
    assert {"bos": "BOS", "eos": "EOS", "both": "EOS"}[layout.first] in text
    for split in layout.splits:
        assert split in text


def test_one_dataset_of_the_layouts_own_files_or_those_of_a_pattern():
    assert layouts.sets(layouts.get("fineweb")) == {"": "**/*.parquet"}
    assert layouts.sets(layouts.get("fineweb"), pattern="000*.parquet") == {"": "000*.parquet"}


def test_a_split_is_a_folder_of_the_input():
    slimpajama = layouts.get("slimpajama")
    assert layouts.sets(slimpajama, split="validation") == {"": "validation/**/*.jsonl.zst"}
    with pytest.raises(UserError, match=r"'val' is not known .* train, validation, test"):
        layouts.sets(slimpajama, split="val")
    with pytest.raises(UserError, match=r"not known to fineweb\. leave it out"):
        layouts.sets(layouts.get("fineweb"), split="train")
    with pytest.raises(UserError, match="both choose files"):
        layouts.sets(slimpajama, split="train", pattern="*.zst")


def test_every_file_of_redpajama_is_in_the_one_set_it_belongs_to():
    parts = layouts.sets(layouts.get("redpajama"))
    files = {
        "arxiv/arxiv_023827cd-7ee8-42e6-aa7b-661731f4c70f.jsonl": "arxiv",
        "book/book.jsonl": "book",
        "c4/c4-train.00000-of-01024.jsonl": "c4",
        "common_crawl/2019-30/en_head_0000.json.gz.dedup.classifier.jsonl.zst": "common_crawl",
        "github/filtered_08cdfa755e6d4d89b673d5bd1acee5f6.sampled.jsonl": "github",
        "stackexchange/stackexchange.jsonl": "stackexchange",
        "wikipedia/wiki.jsonl": "wikipedia",
    }
    assert list(parts) == list(files.values())
    for path, name in files.items():
        # fnmatch's star also crosses folders, hence is wider than our glob.
        matching = {other for other, glob in parts.items() if fnmatch("/" + path, _star(glob))}
        assert matching == {name}


def _star(glob: str) -> str:
    return glob.replace("**/", "*/", 1).replace("/**/", "/*")


def test_the_sample_of_redpajama_and_one_set_of_many():
    redpajama = layouts.get("redpajama")
    sample = layouts.sets(redpajama, sample=True)
    assert len(sample) == 11
    assert sample["cc_2019-30_sample"] == "**/cc_2019-30_sample.jsonl"
    assert list(layouts.sets(redpajama, sample=True, pattern="wiki")) == ["wikipedia_sample"]
    assert list(layouts.sets(redpajama, pattern="arxiv")) == ["arxiv"]
    with pytest.raises(UserError, match=r"names no set of redpajama.*arxiv, book"):
        layouts.sets(redpajama, pattern="**/*.zst")
    with pytest.raises(UserError, match=r"--sample is for redpajama") as wrong:
        layouts.sets(layouts.get("jsonl"), sample=True)
    assert wrong.value.fix == {"--sample": None}


def test_what_slimpajama_leaves_out_and_where_the_texts_are():
    assert layouts.get("slimpajama").filters == {
        "meta.redpajama_set_name": {"not_in": ["RedPajamaGithub"]}
    }
    assert layouts.get("starcoder").text_field == "content"
    assert layouts.get("tinystories").text_field == "story"
