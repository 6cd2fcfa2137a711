"""What goes wrong in a preparation, each through `prepare` as a person meets it.

Every row of the failure table, what must happen, and the tests that prove it. Those without the
name of a file are below.

- Truncated or damaged parquet: named before the work and by its part; quarantine lists it.
    test_damaged_parquet; test_sources: test_a_truncated_file_is_named_and_never_taken_as_whole
- Bad UTF-8: costs one document, in every form.
    test_bad_utf8_costs_one_document
- Bad JSON, no such field, null, no string: cost one record each, within a budget.
    test_bad_records_cost_one_record; test_readers: test_a_bad_line_costs_one_line,
    test_bad_rows_cost_one_row
- Empty documents: counted, never written.
    test_empty_documents_are_counted_and_never_written
- One document of 1 GB: bounded memory, chunks that go on.
    test_long_documents: test_memory_for_a_long_document_is_bounded;
    test_prepare: test_a_long_document_goes_on_in_the_next_chunk
- Special tokens in the text: ordinary text.
    test_special_tokens_in_text_are_text
- Tokenizer without BOS or EOS: auto, none or an id; documents keep their ends.
    test_a_tokenizer_without_bos_and_eos
- Ids above 65,535, sparse ids, added tokens: the element type goes by the largest id; it is checked
  when a dataset is opened, and the model's vocabulary before the first step.
    test_the_element_type_goes_by_the_largest_id, test_a_wrong_element_type_is_refused_at_open;
    e2e/test_wrong_uses: test_vocabulary_larger_than_the_model
- No input, input without text, less text than a sample, a single file: a message, or a dataset.
    test_nothing_to_prepare, test_less_than_a_sample, test_a_single_file_is_enough;
    test_dataset: test_a_dataset_without_tokens_is_refused
- Run again, with other options, with input added: the same tree, nothing stale, nothing mixed in.
    test_nothing_stale_is_left; test_prepare: test_a_finished_job_is_left_alone,
    test_another_job_is_refused_or_replaces
- Disk full: nothing half done is to be seen, and it goes on when there is room.
    test_a_disk_that_is_full_at_any_moment;
    test_faults: test_a_disk_that_fills_up_keeps_what_is_done;
    test_object_store: test_a_disk_that_is_really_full
- Kill -9: the rerun gives the same bytes.
    test_kill; test_prepare: test_killed_at_any_step_the_same_command_finishes;
    e2e/test_prepare_kill: test_twenty_kills
- Clock skew, NFS, names of hosts: no time and no machine in any decision or byte.
    test_clocks_and_hosts_do_not_matter; test_prepare: test_the_manifest_names_no_machine;
    test_array: test_ranks_at_the_same_time, test_the_last_rank_completes_the_dataset
- Names that collide: every file once.
    test_names_that_collide; test_inputs: test_spellings_of_one_name_are_two_files
- on_error and its budget.
    test_what_on_error_does;
    test_finalize: test_the_budget_of_quarantined_inputs_is_counted_in_bytes
- Resume with other ranks, moved and changed datasets, damaged and small caches.
    test_mixed_stream: test_the_stream_is_the_same_for_any_ranks_and_restarts,
    test_the_fingerprint_names_mixture_and_sources;
    test_dataset: test_the_identity_moves_with_the_data;
    test_chunk_cache: test_a_fault_that_stays_is_told, test_what_is_needed_last_goes_first
- A reader of what is printed that leaves: costs nothing.
    test_faults: test_a_reader_that_leaves_costs_nothing
- Ends of epochs, few samples: every sample once.
    test_order: test_perm_is_a_bijection_at_powers_of_two,
    test_every_sample_of_an_epoch_is_met_once;
    test_mixture: test_numbers_of_each_source_run_without_gaps
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from gristmill.data.reading.stream import TokenStream
from gristmill.data.store.dataset import Dataset
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import RunError, UserError

from .conftest import make_text, save_tokenizer, tree
from .test_prepare import documents

LAYOUTS = {
    "a.txt": ("textfiles", {"separator": "--"}),
    "a.jsonl": ("jsonl", {}),
    "a.json": ("jsonl", {"pattern": "*.json"}),
    "a.parquet": ("parquet", {}),
}
"""A file of each form, its layout and the options it takes."""

ALL_REJECTS = {"max_reject_fraction": 1.0}


def listed(out):
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]


def write(path, texts):
    """A file of each form, with texts as bytes."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".txt":
        path.write_bytes(b"--".join(texts))
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"text": pa.array(texts, pa.binary())}), path)
    else:
        lines = [b'{"text": "' + text + b'"}' for text in texts]
        is_array = path.suffix == ".json"
        path.write_bytes(b"[" + b",".join(lines) + b"]" if is_array else b"\n".join(lines))


def decoded(out, folder):
    tokenizer = Tokenizer.load(folder)
    return sorted(tokenizer.decode(ids) for ids in documents(out))


# What is in the files


@pytest.mark.parametrize("damage", ["half", "without footer", "one page"])
def test_damaged_parquet(damage, run_prepare, tmp_path, capsys):
    folder = tmp_path / "tables"
    folder.mkdir()
    for number in range(3):
        table = pa.table({"text": [make_text(100 * number + n, 40) for n in range(100)]})
        pq.write_table(table, folder / f"{number}.parquet", write_page_checksum=True)
    path = folder / "1.parquet"
    data = bytearray(path.read_bytes())
    if damage == "half":
        del data[len(data) // 2 :]
    elif damage == "without footer":
        del data[-8:]
    else:
        data[len(data) // 3 : len(data) // 3 + 64] = bytes(64)
    path.write_bytes(data)
    out = tmp_path / "out"
    with pytest.raises(RunError, match=r"1\.parquet is damaged or incomplete.*--on_error quar"):
        run_prepare("parquet", folder, out)
    told = capsys.readouterr().err
    assert ("footer: 1 of 3 inputs (first 1.parquet)" in told) == (damage != "one page")
    assert not (out / "manifest.json").exists()
    with pytest.raises(UserError, match=r"1 damaged input with .*1\.parquet: damaged") as refused:
        run_prepare("parquet", folder, out, on_error="quarantine")
    run_prepare(
        "parquet",
        folder,
        out,
        on_error="quarantine",
        max_reject_fraction=refused.value.fix["--max_reject_fraction"],
    )
    assert Dataset.open(out).num_documents == 200
    (record,) = listed(out)
    assert (record["path"], record["reason"]) == ("1.parquet", "damaged or unreadable file")
    assert ("footer" in record["detail"]) == (damage != "one page")
    assert str(tmp_path) not in record["detail"]
    assert record["detail"]
    assert "left out, damaged: 1 input (first 1.parquet:" in capsys.readouterr().out


@pytest.mark.parametrize("name", LAYOUTS)
def test_bad_utf8_costs_one_document(name, run_prepare, tokenizer_dir, tmp_path, capsys):
    write(tmp_path / "in" / name, [b"first", b"d\xe9j\xe0 vu", "né".encode(), b"last"])
    layout, options = LAYOUTS[name]
    out = run_prepare(layout, tmp_path / "in", tmp_path / "out", **options, **ALL_REJECTS)
    assert decoded(out, tokenizer_dir) == ["first", "last", "né"]
    (record,) = listed(out)
    assert (record["path"], record["reason"]) == (name, "not UTF-8")
    assert "invalid" in record["detail"]
    assert Dataset.open(out).manifest.source.rejects == {"not UTF-8": 1}
    assert "unreadable: 1 document (1 not UTF-8; listed in" in capsys.readouterr().out


def test_bad_records_cost_one_record(run_prepare, tokenizer_dir, tmp_path, capsys):
    lines = ['{"text": "one"}', '{"text": "t', '{"body": "x"}', '{"text": null}', '{"text": 7}']
    lines += ["[]", '{"text": "two"}']
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"5 of 7 documents could not be read .*bad JSON: 1") as e:
        run_prepare("jsonl", path, tmp_path / "out")
    assert e.value.fix == {"--max_reject_fraction": 0.715}
    out = run_prepare("jsonl", path, tmp_path / "out", max_reject_fraction=0.715)
    assert decoded(out, tokenizer_dir) == ["one", "two"]
    places = [sum(len(line) + 1 for line in lines[:n]) for n in range(1, 6)]
    assert [record["at"] for record in listed(out)] == places
    assert [(record["reason"], record["detail"]) for record in listed(out)[1:]] == [
        ("no field 'text'", "fields: body"),
        ("field 'text' is not text", "null"),
        ("field 'text' is not text", "int"),
        ("not an object", "list"),
    ]
    told = capsys.readouterr().out
    assert "5 documents (1 bad JSON, 2 field 'text' is not text, 1 no field 'text'" in told


@pytest.mark.parametrize("name", LAYOUTS)
def test_empty_documents_are_counted_and_never_written(name, run_prepare, tmp_path, capsys):
    blank = b"\\n \\t" if "json" in name else b" \n\t "
    write(tmp_path / "in" / name, [b"", b"first", blank, "\u3000".encode(), b"last", b""])
    layout, options = LAYOUTS[name]
    out = run_prepare(layout, tmp_path / "in", tmp_path / "out", **options)
    dataset = Dataset.open(out)
    assert dataset.num_documents == 2
    ends = dataset.map(0).ends
    assert np.diff(ends, prepend=0).min() > 1
    assert dataset.manifest.source.empty_documents == 4
    assert "left out, without text: 4 documents" in capsys.readouterr().out


def test_special_tokens_in_text_are_text(run_prepare, tokenizer_dir, tmp_path):
    text = "<s> a </s><s></s> b"
    write(tmp_path / "a.jsonl", [text.encode()])
    for engine in ("tokenizers", "auto"):
        options = {"engine": engine, "bos": "none", "eos": "none"}
        out = run_prepare("jsonl", tmp_path / "a.jsonl", tmp_path / engine, **options)
        (ids,) = documents(out)
        assert not {0, 1} & set(ids), "text has become control tokens"
        assert Tokenizer.load(tokenizer_dir).decode(ids, skip_special=False) == text


# The tokenizer


def test_a_tokenizer_without_bos_and_eos(run_prepare, tmp_path):
    bare = str(save_tokenizer(tmp_path / "bare", bos=None, eos=None))
    write(tmp_path / "a.jsonl", [b"one", b"two words", b"three"])
    encode = Tokenizer.load(bare).encode
    texts = [tuple(encode(text)) for text in ("one", "two words", "three")]

    def prepared(name, **options):
        return documents(
            run_prepare(
                "jsonl", tmp_path / "a.jsonl", tmp_path / name, tokenizer_dir=bare, **options
            )
        )

    # Where each document ends is known from the headers.
    assert sorted(prepared("auto")) == sorted(prepared("none", bos="none", eos="none"))
    assert sorted(prepared("auto")) == sorted(texts)
    assert sorted(prepared("ids", bos=7, eos=9)) == sorted((7, *ids, 9) for ids in texts)
    with pytest.raises(UserError, match=r"--eos 400 is no id of the tokenizer \(it has 0 to 399\)"):
        prepared("wrong", eos=400)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("largest", "added", "num_ids", "dtype"),
    [
        (65_535, 0, 65_536, "uint16"),
        (65_536, 0, 65_537, "uint32"),
        (70_000, 0, 70_001, "uint32"),  # 256 tokens with a gap before the last
        (65_535, 1, 65_537, "uint32"),  # what is added lies beyond the vocabulary
    ],
)
def test_the_element_type_goes_by_the_largest_id(
    largest, added, num_ids, dtype, run_prepare, tmp_path
):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(alphabet) if token != "z"}
    vocabulary["z"] = largest
    if added:  # ids of added tokens are counted from the number of tokens
        vocabulary |= {f"unused {n}": n for n in range(256, largest)}
        vocabulary["unused"] = alphabet.index("z")
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if added:
        tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "a.jsonl", [b"buzz", b"a"])
    options = {"tokenizer_dir": str(tmp_path), "eos": num_ids - 1}
    out = run_prepare("jsonl", tmp_path / "a.jsonl", tmp_path / "out", **options)
    dataset = Dataset.open(out)
    assert (dataset.num_token_ids, dataset.dtype) == (num_ids, dtype)
    buzz = [alphabet.index("b"), alphabet.index("u"), largest, largest]
    assert sorted(documents(out)) == sorted(
        [(*buzz, num_ids - 1), (alphabet.index("a"), num_ids - 1)]
    )


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "uint32"), ("dtype", "floating"), ("num_token_ids", 65_537)]
)
def test_a_wrong_element_type_is_refused_at_open(field, value, run_prepare, records, tmp_path):
    out = run_prepare("jsonl", records, tmp_path / "out")
    contents = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(contents | {field: value}))
    with pytest.raises(RunError, match=r"manifest\.json says that token ids are .*copy the data"):
        Dataset.open(out)


# Little or no input


@pytest.mark.parametrize(
    ("layout", "files", "message"),
    [
        ("textfiles", {}, r"there are no files under .*in .*name another folder"),
        (
            "textfiles",
            {"a.md": b"x"},
            r"no file under .*\(there: 1 \.md\).*--pattern '",
        ),
        ("textfiles", {"a.txt": b""}, r"a\.txt holds no text. name other input"),
        ("textfiles", {"a.txt": b"", "b.txt": b" \n"}, r"in holds no text \(2 files\)"),
        ("jsonl", {"a.jsonl": b""}, "holds no text"),
        ("jsonl", {"a.jsonl": b'{"text": ""}'}, "holds no text"),
        ("jsonl", {"a.jsonl": b'{"body": "x"}'}, r"no field 'text'; fields: body\).*--text_field"),
        ("jsonl", {"a.jsonl": b"Call me Ishmael."}, r"bad JSON; .*choose the layout that fits"),
        ("parquet", {"a.parquet": b""}, r"a\.parquet is damaged or incomplete .* 0 bytes"),
    ],
)
def test_nothing_to_prepare(layout, files, message, run_prepare, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    with pytest.raises((UserError, RunError), match=message):
        run_prepare(layout, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_filters_that_leave_nothing(run_prepare, records, tmp_path):
    records.write_bytes(b"{\n" + records.read_bytes())
    with pytest.raises(UserError, match=r'nothing of .*all\.jsonl \(\{"lang": "en"\}\).*--filter'):
        run_prepare("jsonl", records, tmp_path / "out", filter={"lang": "en"})
    assert not (tmp_path / "out").exists()


def test_an_empty_file_among_others(run_prepare, novels, tmp_path):
    (novels / "nothing.txt").write_bytes(b"")
    out = run_prepare("textfiles", novels, tmp_path / "out")
    assert Dataset.open(out).num_documents == 12
    assert Dataset.open(out).manifest.source.empty_documents == 1


def test_less_than_a_sample(run_prepare, tmp_path):
    (tmp_path / "a.txt").write_text("Two words.")
    dataset = Dataset.open(run_prepare("textfiles", tmp_path / "a.txt", tmp_path / "out"))
    with pytest.raises(UserError, match=rf"{dataset.num_tokens} tokens in 1 chunks?.*takes 65"):
        TokenStream(dataset, 64, seed=0)


def test_a_single_file_is_enough(run_prepare, tmp_path):
    text = make_text(1, 3000)
    (tmp_path / "novel.txt").write_text(text)
    out = run_prepare("textfiles", tmp_path / "novel.txt", tmp_path / "out", val_fraction=0.1)
    train, val = Dataset.open(out / "train"), Dataset.open(out / "val")
    assert train.text_bytes + val.text_bytes == len(text.encode())
    assert 0 < val.text_bytes < train.text_bytes


# Outputs


def test_nothing_stale_is_left(run_prepare, novels, tmp_path, small_units):
    out = run_prepare("textfiles", novels, tmp_path / "out", chunk_tokens=1024)
    many = len(list(out.glob("chunk-*")))
    (novels / "added.txt").write_text(make_text(99, 50))
    with pytest.raises(UserError, match=r"of another job: other input files\. .*--overwrite"):
        run_prepare("textfiles", novels, out, chunk_tokens=1024)
    run_prepare("textfiles", novels, out, overwrite=True)
    assert len(list(out.glob("chunk-*"))) < many
    assert tree(out) == tree(run_prepare("textfiles", novels, tmp_path / "fresh"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "novels", "out"]


def test_a_disk_that_is_full_at_any_moment(
    run_prepare, novels, tmp_path, monkeypatch, small_units, in_this_process
):
    options = {"val_fraction": 0.2}
    expected = tree(run_prepare("textfiles", novels, tmp_path / "calm", **options))
    out, fsync = tmp_path / "out", os.fsync
    room = 0

    def full(fd):
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(28, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    refused = 0
    for attempt in range(100):
        room = attempt
        try:
            run_prepare("textfiles", novels, out, **options)
            break
        except RunError as error:
            refused += f"no space left for {out} (" in str(error)
        for manifest in out.glob("*/manifest.json"):
            Dataset.open(manifest.parent)  # a dataset that can be seen is complete
    assert refused == attempt > 5
    assert tree(out) == expected


def test_clocks_and_hosts_do_not_matter(
    run_prepare, novels, tmp_path, monkeypatch, small_units, in_this_process
):
    expected = tree(run_prepare("textfiles", novels, tmp_path / "calm"))
    for number, path in enumerate(sorted(novels.rglob("*.txt"))):
        os.utime(path, ns=(0, 0) if number % 2 else (4 * 10**18, 4 * 10**18))
    clock = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(time, "time_ns", lambda: next(clock) * 10**9)
    for module, name in ((socket, "gethostname"), (platform, "node")):
        monkeypatch.setattr(module, name, lambda: "elsewhere")
    monkeypatch.setenv("HOSTNAME", "elsewhere")
    out = run_prepare("textfiles", novels, tmp_path / "out")
    assert tree(out) == expected
    # Nor do those of the files that were made: the job is known to be finished.
    for path in out.rglob("*"):
        os.utime(path, ns=(0, 0))
    run_prepare("textfiles", novels, out)
    assert {path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == {0}


def test_names_that_collide(run_prepare, tokenizer_dir, tmp_path):
    folder = tmp_path / "in"
    names = ["a/x.txt", "b/x.txt", "b/X.txt", "b/caf\xe9.txt", "b/cafe\u0301.txt"]
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    if len(list(folder.rglob("*.txt"))) < len(names):
        pytest.skip("this file system holds some of these names for the same")
    (folder / "link.txt").symlink_to(folder / "a" / "x.txt")
    (folder / "folder").symlink_to(folder / "b")
    out = run_prepare("textfiles", folder, tmp_path / "out")
    assert decoded(out, tokenizer_dir) == sorted(names)
    assert len(Dataset.open(out).manifest.source.inputs) == 5
    folder.rename(tmp_path / "moved")
    again = tmp_path / "moved"
    for link, target in (("link.txt", "a/x.txt"), ("folder", "b")):
        (again / link).unlink()
        (again / link).symlink_to(again / target)
    assert tree(run_prepare("textfiles", again, tmp_path / "again")) == tree(out)


# What is left out


def test_what_on_error_does(run_prepare, records, tmp_path, capsys):
    whole = records.read_bytes()
    records.write_bytes(whole + b"{\n")
    (records.parent / "b.json").write_bytes(b'[{"text": "one"}, {"text": "two')
    options = {"pattern": "*.json*"}
    out = tmp_path / "out"
    with pytest.raises(UserError, match=rf"all\.jsonl cannot be prepared, at {len(whole):,}: bad"):
        run_prepare("jsonl", records.parent, out, on_error="fail", **options)
    with pytest.raises(RunError, match=r"1 of 1 parts .*others are done:\n.*b\.json is damaged"):
        run_prepare("jsonl", records.parent, out, on_error="skip", **options)
    limits = {"on_error": "quarantine", "max_reject_fraction": 0.003}
    with pytest.raises(UserError, match=r"1 of 301 documents .*bad JSON: 1; first in all\.jsonl"):
        run_prepare("jsonl", records.parent, out, **limits, **options)
    capsys.readouterr()
    limits["max_reject_fraction"] = 0.004
    run_prepare("jsonl", records.parent, out, **limits, **options)
    told = capsys.readouterr().out
    assert "left out, unreadable: 1 document (1 bad JSON; listed in " in told
    assert "left out, damaged: 1 input (first b.json: damaged or unreadable file; listed" in told
    assert {(record["path"], record["at"]) for record in listed(out)} == {
        ("all.jsonl", len(whole)),
        ("b.json", 0),
    }
    assert Dataset.open(out).num_documents == 300
    card = (out / "README.md").read_text()
    assert "- 1 document: bad JSON" in card
    assert "`b.json`: damaged" in card
