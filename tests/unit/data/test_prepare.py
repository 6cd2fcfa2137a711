from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from gristmill.config.commands import Prepare, RayCluster
from gristmill.data import prepare, storage
from gristmill.data.preparation import finalize, parts, units, workspace
from gristmill.data.preparation.executors import work
from gristmill.data.preparation.workspace import JOB, LocalWorkspace
from gristmill.data.storage import Storage
from gristmill.data.store.dataset import Dataset
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import Interrupted, UserError

from .conftest import make_text, save_tokenizer, tree


def documents(path):
    """The token ids of every document of a dataset, those cut by a chunk's end whole again."""
    dataset = Dataset.open(path)
    found, open_document = [], []
    for number, chunk in enumerate(dataset.chunks):
        mapped = dataset.map(number)
        for start, end in zip([0, *mapped.ends[:-1].tolist()], mapped.ends.tolist(), strict=True):
            open_document += mapped.tokens[start:end].tolist()
            if not (chunk.continues and end == len(mapped.tokens)):
                found.append(tuple(open_document))
                open_document = []
    assert not open_document
    return found


def test_every_document_is_there_framed_and_in_a_hashed_order(
    run_prepare, records, tmp_path, tokenizer_dir, small_units, capsys
):
    out = run_prepare("jsonl", records, tmp_path / "out")
    tokenizer = Tokenizer.load(tokenizer_dir)
    texts = [json.loads(line)["text"] for line in records.read_text().splitlines()]
    expected = [(0, *tokenizer.encode(text), 1) for text in texts]
    found = documents(out)
    assert sorted(found) == sorted(expected)
    assert found != expected
    dataset = Dataset.open(out)
    totals = dataset.manifest.totals
    assert (totals.documents, totals.tokens) == (300, sum(map(len, expected)))
    assert dataset.text_bytes == sum(len(text.encode()) for text in texts)
    assert dataset.num_token_ids == tokenizer.num_token_ids
    assert dataset.dtype == "uint16"
    assert Tokenizer.load(dataset.tokenizer_dir).digest == dataset.manifest.tokenizer.digest
    assert not (out / workspace.NAME).exists()
    told = capsys.readouterr().out
    assert "300 documents" in told
    assert f"{totals.tokens:,} tokens" in told
    assert f"--data LitData --data.data_path {out}" in told


def test_text_files_begin_with_bos(run_prepare, novels, tmp_path, tokenizer_dir):
    tokenizer = Tokenizer.load(tokenizer_dir)
    found = documents(run_prepare("textfiles", novels, tmp_path / "out"))
    texts = [path.read_text() for path in novels.rglob("*.txt")]
    assert sorted(found) == sorted((0, *tokenizer.encode(text)) for text in texts)
    parted = documents(run_prepare("textfiles", novels, tmp_path / "parted", separator="\n"))
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    assert sorted(parted) == sorted((0, *tokenizer.encode(line)) for line in lines)


def test_the_manifest_names_no_machine(run_prepare, records, tmp_path):
    out = run_prepare("jsonl", records, tmp_path / "out", val_fraction=0.2)
    for name in ("manifest.json", "index.json"):
        text = (out / "train" / name).read_text()
        assert str(tmp_path) not in text
        assert os.uname().nodename not in text
    moved = tmp_path / "elsewhere" / "records"
    shutil.copytree(records.parent, moved)
    again = run_prepare("jsonl", moved, tmp_path / "again", val_fraction=0.2)
    assert tree(again) == tree(out)


def test_bytes_are_equal_for_any_number_of_workers(run_prepare, novels, tmp_path, small_units):
    trees = [
        tree(run_prepare("textfiles", novels, tmp_path / f"{n}", num_workers=n, val_fraction=0.1))
        for n in (1, 2, 3)
    ]
    assert {"train/manifest.json", "val/manifest.json"} <= set(trees[0])
    assert trees[0] == trees[1] == trees[2]


def test_small_parts_are_joined(run_prepare, records, tmp_path, small_units):
    out = run_prepare("jsonl", records, tmp_path / "out", val_fraction=0.1)
    assert [len(Dataset.open(out / name).chunks) for name in ("train", "val")] == [1, 1]
    assert len(documents(out / "train")) + len(documents(out / "val")) == 300


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


STEPS = [
    (parts, "write_chunk"),
    (workspace, "_rename_new"),
    (Storage, "write"),
    (Storage, "create"),
    (Storage, "put"),
    (LocalWorkspace, "place"),
    (prepare, "finalize"),
    (finalize, "_finish_split"),
    (finalize, "index_json"),
    (os, "replace"),
    (shutil, "rmtree"),
]


@pytest.mark.parametrize(
    ("module", "name"), STEPS, ids=lambda value: getattr(value, "__name__", value)
)
def test_killed_at_any_step_the_same_command_finishes(
    module, name, run_prepare, novels, tmp_path, small_units, monkeypatch, in_this_process
):
    """Killed before and after each call of a step that leaves traces, then run again."""
    options = {"val_fraction": 0.1, "chunk_tokens": 2048}
    undisturbed = tree(run_prepare("textfiles", novels, tmp_path / "calm", **options))
    step = getattr(module, name)
    done = kills = 0

    def interrupted(*args, **kwargs):
        nonlocal done, kills
        done += 1
        if done > kills // 2:
            kills += 1
            if kills % 2 == 0:
                step(*args, **kwargs)
            raise Killed
        return step(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)
    out = tmp_path / "killed"
    for _ in range(200):
        done = 0
        try:
            run_prepare("textfiles", novels, out, **options)
            break
        except Killed:
            for split in ("train", "val"):
                if (out / split / "manifest.json").exists():
                    Dataset.open(out / split)
    assert kills >= 2
    assert {k: v for k, v in tree(out).items() if not k.startswith(".prepare")} == undisturbed


def test_files_half_written_when_killed_are_removed(
    run_prepare, novels, tmp_path, small_units, monkeypatch, in_this_process
):
    """SIGKILL in the middle of a write leaves its temporary file behind, whichever it is."""
    options = {"val_fraction": 0.1, "chunk_tokens": 2048}
    undisturbed = tree(run_prepare("textfiles", novels, tmp_path / "calm", **options))
    out, write, cut = tmp_path / "killed", storage._write_down, set()

    def killed(path, data):
        name = path.parent / path.name[1:-17]
        if name not in cut:
            cut.add(name)
            # Another name of the same form: `path` itself goes when the exception passes.
            write(path.with_name(f"{path.name[:-16]}0123456789ab.tmp"), data[: len(data) // 2])
            raise Killed
        write(path, data)

    monkeypatch.setattr(storage, "_write_down", killed)
    for _ in range(200):
        with contextlib.suppress(Killed):
            run_prepare("textfiles", novels, out, **options)
            break
    assert {"train/tokenizer", "val/tokenizer", "train", "val"} <= {
        str(name.parent.relative_to(out)) for name in cut
    }
    assert tree(out) == undisturbed


def test_unfinished_work_is_no_dataset_and_is_continued(
    run_prepare, novels, tmp_path, small_units, monkeypatch, capsys, in_this_process
):
    ran, run_unit = [], work.run_unit

    def third_fails(plan, unit, *args):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(unit)
        return run_unit(plan, unit, *args)

    monkeypatch.setattr(work, "run_unit", third_fails)
    out = tmp_path / "out"
    with pytest.raises(
        Interrupted, match=r"3 of \d+ parts are done. the same command goes on"
    ) as stop:
        run_prepare("textfiles", novels, out)
    assert stop.value.signal_number == signal.SIGINT
    with pytest.raises(UserError, match="is not finished. run the `gristmill prepare` command"):
        Dataset.open(out)
    with pytest.raises(UserError, match="unfinished work of another job"):
        run_prepare("textfiles", novels, out, seed=1)
    monkeypatch.setattr(work, "run_unit", lambda p, u, *a: (ran.append(u), run_unit(p, u, *a)))
    run_prepare("textfiles", novels, out)
    assert "going on: 3 of" in capsys.readouterr().err
    assert sorted(ran) == list(range(len(ran)))
    assert len(ran) > 4


def test_a_finished_job_is_left_alone(run_prepare, records, tmp_path, capsys):
    out = run_prepare("jsonl", records, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    run_prepare("jsonl", records, out)
    assert "is finished already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("change", ["option", "text", "tokenizer"])
def test_another_job_is_refused_or_replaces(change, run_prepare, records, tmp_path):
    out = run_prepare("jsonl", records, tmp_path / "out", val_fraction=0.1)
    old = Dataset.open(out / "train")
    first = old.map(0).tokens
    seen = first[:50].tolist()
    options = {"val_fraction": 0.1}
    if change == "option":
        options = {"val_fraction": 0.0}
    elif change == "text":
        text = records.read_text()
        changed = text.replace("tokenizer", "tokeniser")
        assert changed != text
        records.write_text(changed)  # of the same size
    else:
        other = save_tokenizer(tmp_path / "other", bos=None, eos="<eos>", vocab_size=300)
        options["tokenizer_dir"] = str(other)
    with pytest.raises(UserError, match="holds the dataset of another job.*--overwrite"):
        run_prepare("jsonl", records, out, **options)
    run_prepare("jsonl", records, out, **options, overwrite=True)
    fresh = run_prepare("jsonl", records, tmp_path / "fresh", **options)
    assert tree(out) == tree(fresh)
    assert first[:50].tolist() == seen, "a reader's mapping was changed"
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == ["out"]


def test_a_swap_killed_in_the_middle_is_finished(run_prepare, records, tmp_path, monkeypatch):
    out = run_prepare("jsonl", records, tmp_path / "out")
    fresh = run_prepare("jsonl", records, tmp_path / "fresh", seed=1)
    rename, calls = os.rename, []

    def second_fails(source, target):
        if str(target).endswith("/out"):
            raise Killed
        calls.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(Killed):
        run_prepare("jsonl", records, out, seed=1, overwrite=True)
    assert not out.exists()
    monkeypatch.undo()
    run_prepare("jsonl", records, out, seed=1)
    assert tree(out) == tree(fresh)


def test_a_dataset_behind_a_link_is_replaced_where_it_is(run_prepare, records, tmp_path):
    (tmp_path / "large disk").mkdir()
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "large disk" / "data")
    run_prepare("jsonl", records, tmp_path / "large disk" / "data", seed=1)
    run_prepare("jsonl", records, out, overwrite=True)
    assert tree(out) == tree(run_prepare("jsonl", records, tmp_path / "calm"))
    assert [path.name for path in (tmp_path / "large disk").iterdir()] == ["data"]
    assert out.is_symlink()


def test_a_mounted_disk_is_not_swapped(run_prepare, records, tmp_path, monkeypatch):
    out = run_prepare("jsonl", records, tmp_path / "out")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == out)
    with pytest.raises(UserError, match="a mounted disk cannot put another in its place whole"):
        run_prepare("jsonl", records, out, overwrite=True)


def test_other_peoples_files_are_never_removed(run_prepare, records, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds other things than a dataset \(thesis.tex\)"):
            run_prepare("jsonl", records, out, overwrite=overwrite)
    assert (out / "thesis.tex").read_text() == "x"


def test_rejects_are_counted_listed_and_limited(run_prepare, novels, tmp_path, capsys):
    (novels / "image.txt").write_bytes(b"\x89PNG\0\0")
    (novels / "latin.txt").write_bytes("déjà".encode("latin-1"))
    (novels / "blank.txt").write_text("\n \n")
    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"2 of 15 documents .*binary: 1, not UTF-8: 1.*0\.134"
    ) as e:
        run_prepare("textfiles", novels, out)
    run_prepare("textfiles", novels, out, **{"max_reject_fraction": list(e.value.fix.values())[0]})
    listed = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert sorted((r["path"], r["reason"]) for r in listed) == [
        ("image.txt", "binary"),
        ("latin.txt", "not UTF-8"),
    ]
    source = Dataset.open(out).manifest.source
    assert source.rejects == {"binary": 1, "not UTF-8": 1}
    assert source.empty_documents == 1
    told = capsys.readouterr().out
    assert "left out, unreadable: 2 documents (1 binary, 1 not UTF-8" in told
    assert "left out, without text: 1 document" in told


def test_a_long_document_goes_on_in_the_next_chunk(run_prepare, tmp_path, tokenizer_dir):
    folder = tmp_path / "text"
    folder.mkdir()
    texts = [make_text(0, 4000), make_text(1, 50), make_text(2, 900)]
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    out = run_prepare("textfiles", folder, tmp_path / "out", chunk_tokens=1024)
    chunks = Dataset.open(out).chunks
    assert max(chunk.tokens for chunk in chunks) <= 1024
    assert sum(chunk.continues for chunk in chunks) >= 4
    tokenizer = Tokenizer.load(tokenizer_dir)
    assert sorted(documents(out)) == sorted((0, *tokenizer.encode(text)) for text in texts)
    assert Dataset.open(out).num_documents == 3


def test_blocks_shuffle_in_bounded_memory(run_prepare, records, tmp_path, monkeypatch):
    whole = documents(run_prepare("jsonl", records, tmp_path / "whole"))
    monkeypatch.setattr(parts, "_BLOCK_TOKENS", 2000)
    monkeypatch.setattr(units, "_BATCH_TEXTS", 7)
    blocks = documents(run_prepare("jsonl", records, tmp_path / "blocks"))
    assert sorted(blocks) == sorted(whole)
    assert blocks != whole


def test_split_sides_do_not_depend_on_units(run_prepare, records, tmp_path, small_units):
    small = run_prepare("jsonl", records, tmp_path / "small", val_fraction=0.2)
    lines = records.read_text().splitlines()
    records.write_text("\n".join(reversed(lines)))
    turned = run_prepare("jsonl", records, tmp_path / "turned", val_fraction=0.2)
    assert sorted(documents(small / "val")) == sorted(documents(turned / "val"))
    assert not set(documents(small / "val")) & set(documents(small / "train"))


def test_a_large_vocabulary_takes_four_bytes(run_prepare, records, tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: 65_400 + n for n, token in enumerate(alphabet)}
    vocabulary |= {f"unused {n}": n for n in range(65_400)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    out = run_prepare("jsonl", records, tmp_path / "out", tokenizer_dir=str(tmp_path))
    dataset = Dataset.open(out)
    assert dataset.num_token_ids == 65_656
    assert dataset.dtype == "uint32"
    texts = [json.loads(line)["text"] for line in records.read_text().splitlines()]
    assert sorted(map(len, documents(out))) == sorted(len(text.encode()) for text in texts)
    assert max(map(max, documents(out))) > 65_535


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_dir": None}, "--input_dir is missing. for example: gristmill prepare jsonl"),
        ({"output_dir": None}, "--output_dir is missing"),
        ({"tokenizer_dir": None}, "--tokenizer_dir is missing"),
        ({"layout": "csv"}, "unknown layout 'csv'"),
        ({"val_fraction": 1.0}, "--val_fraction 1.0 is no share"),
        ({"max_reject_fraction": -0.1}, "--max_reject_fraction -0.1 is no share"),
        ({"chunk_tokens": 10}, "--chunk_tokens 10 is out of range"),
        ({"num_workers": 0}, "--num_workers 0 is too few"),
        ({"bos": 400}, "--bos 400 is no id of the tokenizer"),
        ({"text_field": "content"}, r"no field 'content'; fields: id, text\)"),
        ({"separator": "x"}, "--separator 'x' parts text files; in jsonl a record is a document"),
        ({"layout": "textfiles", "separator": ""}, "--separator is empty"),
        ({"layout": "textfiles"}, r"no file under .* matches '\*\*/\*\.txt' \(there: 1 \.jsonl\)"),
        ({"layout": "textfiles", "text_field": "body"}, "--text_field body speaks of fields"),
        ({"layout": "textfiles", "filter": {"a": 1}}, "--filter .* speaks of fields"),
        ({"sample": True}, "--sample is for redpajama"),
        ({"split": "train"}, "--split 'train' is not known to jsonl"),
        ({"rank": 0}, "--rank is for --executor array; this is local"),
        ({"ray": RayCluster(num_cpus=2)}, "--ray is for --executor ray; this is local"),
        ({"executor": "ray", "num_workers": 2}, "--num_workers 2 is for processes of this machine"),
        ({"executor": "array", "rank": 0, "world": 2, "overwrite": True}, "--overwrite cannot be"),
        ({"executor": "array", "rank": 2, "world": 2}, "--rank 2 is not in a --world of 2"),
        ({"layout": "status", "output_dir": None}, "which output"),
    ],
    ids=str,
)
def test_wrong_options(options, message, run_prepare, records, tmp_path):
    base = {"layout": "jsonl", "input_dir": str(records.parent)}
    base |= {"output_dir": str(tmp_path / "out"), "tokenizer_dir": str(run_prepare.tokenizer_dir)}
    if options.get("layout") == "textfiles" and len(options) > 1:
        options = options | {"pattern": "*.jsonl"}
    with pytest.raises(UserError, match=message):
        prepare.prepare(Prepare(**base | options))
    assert not (tmp_path / "out").exists()


def test_layouts_are_listed(capsys):
    for layout in (None, "list"):
        prepare.prepare(Prepare(layout=layout))
        assert capsys.readouterr().out.startswith("textfiles\njsonl\n")


def test_input_and_output_may_not_overlap_the_wrong_way(run_prepare, novels, tmp_path):
    with pytest.raises(UserError, match="lies in the output"):
        run_prepare("textfiles", novels / "a", novels)
    with pytest.raises(UserError, match="lies in the output"):
        run_prepare("textfiles", novels, novels)
    inside = run_prepare("textfiles", novels, novels / "a" / "out")
    calm = tree(run_prepare("textfiles", novels, tmp_path / "out"))
    assert tree(inside) == calm
    again = run_prepare("textfiles", novels, tmp_path / "again")
    assert tree(again) == calm, "an output was taken for input"


def test_killed_while_tidying_up(run_prepare, records, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    rmtree = shutil.rmtree

    def killed(path, *args, **kwargs):
        if path == out / workspace.NAME / "units":
            raise Killed
        rmtree(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            run_prepare("jsonl", records, out)
    assert (out / workspace.NAME / "job.json").exists()
    assert Dataset.open(out).num_documents == 300
    capsys.readouterr()
    prepare.prepare(Prepare(layout="status", output_dir=str(out)))
    assert capsys.readouterr().out.startswith("finished: ")
    run_prepare("jsonl", records, out)
    assert "is finished already" in capsys.readouterr().out
    assert not (out / workspace.NAME).exists()


def test_touched_inputs_are_another_job(run_prepare, records, tmp_path):
    out = run_prepare("jsonl", records, tmp_path / "out")
    os.utime(records, ns=(5, 5))
    with pytest.raises(UserError, match=r"of another job: input files have changed since"):
        run_prepare("jsonl", records, out)
    (out / JOB).unlink()  # a copy without the hidden file
    run_prepare("jsonl", records, out)


def test_unfinished_work_of_another_job_is_replaced(
    run_prepare, novels, tmp_path, small_units, monkeypatch, in_this_process
):
    out = tmp_path / "out"

    def stopped(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "finalize", stopped)
        with pytest.raises(Killed):
            run_prepare("textfiles", novels, out, seed=1)
    run_prepare("textfiles", novels, out, overwrite=True)
    assert tree(out) == tree(run_prepare("textfiles", novels, tmp_path / "calm"))


def test_sets_become_datasets_of_their_own(run_prepare, tmp_path, capsys):
    corpus = tmp_path / "corpus"
    for name, file in (("arxiv", "arxiv_0.jsonl"), ("book", "book.jsonl")):
        (corpus / name).mkdir(parents=True)
        (corpus / name / file).write_text(json.dumps({"text": f"words of {name}"}) + "\n")
    out = run_prepare("redpajama", corpus, tmp_path / "out")
    for name in ("arxiv", "book"):
        assert Dataset.open(out / name).num_documents == 1
    assert sorted(path.name for path in out.iterdir()) == ["arxiv", "book"]
    with pytest.raises(UserError, match="holds none of the sets"):
        run_prepare("redpajama", corpus, tmp_path / "none", sample=True)
    prepare.prepare(Prepare(layout="status", output_dir=str(out)))
    assert capsys.readouterr().out.count("finished: ") == 2
