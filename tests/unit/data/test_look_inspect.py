"""What `data inspect` shows: documents, samples, and exactly what training sees."""

import io
import json
import re

import numpy as np
import pytest
import xxhash

from gristmill.config.commands import Pretrain
from gristmill.config.data import LitData
from gristmill.config.data_commands import DataInspect
from gristmill.data.look import inspect, runs
from gristmill.data.look.page import Page
from gristmill.data.look.places import Places
from gristmill.data.look.transcript import Transcript, cut, lines
from gristmill.data.reading.stream import TokenStream
from gristmill.data.store.dataset import Dataset
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError

from .look_case import write_dataset


@pytest.fixture
def prepared(run_prepare, novels, tmp_path):
    """Twelve documents in several chunks; the longer ones are cut."""
    return run_prepare("textfiles", novels, tmp_path / "out", chunk_tokens=1024, eos=1)


def shown(capsys, path=None, **options):
    inspect.run(DataInspect(data_path=None if path is None else str(path), **options))
    return capsys.readouterr().out


def all_documents(dataset):
    """Every document's tokens, put together from the chunks one by one."""
    found, open_ = [], []
    for number in range(len(dataset.chunks)):
        mapped = dataset.map(number)
        start = 0
        for index, end in enumerate(mapped.ends.tolist()):
            open_ += mapped.tokens[start:end].tolist()
            start = end
            if not (mapped.continues and index == len(mapped.ends) - 1):
                found.append(open_)
                open_ = []
    return found


def test_places_number_the_documents_over_cut_chunks(prepared):
    dataset = Dataset.open(prepared)
    assert any(chunk.continues for chunk in dataset.chunks)
    places, expected = Places(dataset), all_documents(dataset)
    assert places.num_documents == len(expected) == dataset.num_documents
    for number, tokens in enumerate(expected):
        assert places.length(number) == len(tokens)
        assert places.tokens(number, 10**9).tolist() == tokens
        assert places.tokens(number, 7).tolist() == tokens[:7]


def test_every_token_knows_its_document(prepared):
    dataset = Dataset.open(prepared)
    places, expected = Places(dataset), all_documents(dataset)
    for chunk in range(len(dataset.chunks)):
        tokens = dataset.map(chunk).tokens
        for at in range(0, len(tokens), 37):
            place = places.at(chunk, at)
            assert expected[place.document][place.before] == tokens[at]


def test_a_document_is_shown_with_its_text_and_special_tokens(prepared, novels, capsys):
    page = shown(capsys, prepared, document=3, max_chars=0)
    _, _, body = page.partition("⟦document 3⟧\n")
    text, _, rest = body.partition("⟦</s>⟧")
    assert text.startswith("⟦<s>⟧")
    texts = {path.read_text(encoding="utf-8") for path in novels.rglob("*.txt")}
    assert text.removeprefix("⟦<s>⟧") in texts
    assert rest == "\n⟦end of document 3⟧\n"


def test_what_is_cut_says_so(prepared, capsys):
    page = shown(capsys, prepared, document=3, max_chars=50)
    assert "--max_chars 0 shows them" in page
    assert "⟦end of document" not in page
    assert len(page) < 500


def test_a_step_is_the_batch_that_training_reads(prepared, capsys):
    stream = TokenStream(Dataset.open(prepared), 32, seed=7)
    batch = stream.batch(3 * 5, 5)
    page = shown(capsys, prepared, step=4, seq_len=32, global_batch_size=5, seed=7)
    digest = xxhash.xxh3_64_hexdigest(np.ascontiguousarray(batch.tokens, dtype="<i8").data)
    assert f"batch {digest}" in page
    for number in batch.sample_ids.tolist():
        assert f"sample {number:,} " in page


def test_all_ids_of_a_step_in_order(prepared, capsys):
    batch = TokenStream(Dataset.open(prepared), 32, seed=7).batch(0, 3)
    options = {"step": 1, "seq_len": 32, "global_batch_size": 3, "seed": 7}
    page = shown(capsys, prepared, **options, ids=True, max_chars=0)
    ids = [int(word) for word in re.findall(r"^ *\d+ +(\d+)  ", page, re.MULTILINE)]
    assert ids == batch.tokens.flatten().tolist()
    page = shown(capsys, prepared, **options, ids=True, max_chars=0, row=1)
    ids = [int(word) for word in re.findall(r"^ *\d+ +(\d+)  ", page, re.MULTILINE)]
    assert ids == batch.tokens[1].tolist()


def test_boundaries_in_a_sample_are_where_documents_end(tmp_path, capsys):
    folder = write_dataset(tmp_path / "d", [[3, 4, 20]])
    page = shown(capsys, folder, sample=0, seq_len=9)
    assert "no tokenizer is in it" in page
    body = page[page.index("⟦") :].splitlines()
    assert body == [
        "⟦document 0⟧",
        "0 1 2",
        "⟦end of document 0⟧",
        "⟦document 1⟧",
        "3 4 5 6",
        "⟦end of document 1⟧",
        "⟦document 2⟧",
        "7 8 9",
        "⟦document 2 goes on⟧",
    ]
    page = shown(capsys, folder, sample=1, seq_len=9)
    assert page[page.index("⟦") :].splitlines() == [
        "⟦document 2, from its token 2⟧",
        "9 10 11 12 13 14 15 16 17 18",
        "⟦document 2 goes on⟧",
    ]


def run_directory(folder, dataset_path, **length):
    """A run as training records it."""
    directory = pytest.importorskip("gristmill.train.directory")
    from gristmill.train.length import Length

    cfg = Pretrain(model_name="x", data=LitData(data_path=str(dataset_path), seed=11))
    dataset = Dataset.open(dataset_path)
    sizes = {"seq_len": 16, "global_batch_size": 4, "total_steps": 9} | length
    full = Length(**sizes, warmup_steps=1, save_interval=1, eval_interval=1, max_time_s=None)
    folder.mkdir()
    identity = directory.identity(cfg, {}, dataset.dataset_id, "32-true")
    directory.write(folder, cfg, identity, full, 1)
    return folder


def test_a_run_gives_seed_lengths_and_data(prepared, tmp_path, capsys):
    run = run_directory(tmp_path / "run", prepared)
    by_hand = shown(capsys, prepared, step=3, seq_len=16, global_batch_size=4, seed=11)
    page = shown(capsys, run=str(run), step=3)
    how = "documents of a row are kept apart (document mask)\n"
    assert page.replace("step 3 of 9", "step 3").replace(how, "") == by_hand
    assert how in page
    with pytest.raises(UserError, match="--seq_len 8, but the run's is 16"):
        shown(capsys, run=str(run), step=3, seq_len=8)
    with pytest.raises(UserError, match="--seed 8, but the run's is 11"):
        shown(capsys, run=str(run), step=3, seed=8)
    assert "the run ends before it" in shown(capsys, run=str(run), step=10)


def test_other_data_than_the_runs_is_refused(prepared, tmp_path, capsys):
    run = run_directory(tmp_path / "run", prepared)
    other = write_dataset(tmp_path / "other", [[400]])
    with pytest.raises(UserError, match="is not what the run in"):
        shown(capsys, other, run=str(run), step=1)
    with pytest.raises(UserError, match="holds no run"):
        shown(capsys, run=str(tmp_path), step=1)


def test_samples_are_counted_as_the_run_counted_them(tmp_path):
    rows = [{"step": 0, "samples": 0}, {"step": 2, "samples": 20}, {"step": 3, "samples": 24}]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "samp'
    (tmp_path / "metrics.jsonl").write_text(text)
    # The first two steps, made before a fork, had ten samples each; later ones have four.
    assert [runs.consumed(tmp_path, step, 4) for step in (3, 4, 5, 7)] == [20, 24, 28, 36]
    assert runs.consumed(tmp_path / "none", 3, 4) == 8


def test_text_that_looks_like_a_mark_or_a_control_is_shown_for_what_it_is(tokenizer_dir):
    tokenizer = Tokenizer.load(tokenizer_dir)
    text = "a </s> b \x1b[31m ⟦x⟧ \u202e\tc\nd"
    parts = list(Transcript(tokenizer).parts([0, *tokenizer.encode(text), 1]))
    flat = "".join(part if isinstance(part, str) else part[0] for part in parts)
    assert flat == ("⟦<s>⟧a </s> b ⟦U+001B⟧[31m ⟦U+27E6⟧x⟦U+27E7⟧ ⟦U+202E⟧\tc\nd⟦</s>⟧")
    assert [len(line) > 0 for line in lines(parts)] == [True, True]
    kept, short = cut(iter(parts), 8)
    assert short
    assert "".join(text for text, _ in kept) == "⟦<s>⟧a <"


def test_ids_that_have_no_token_are_marked(tokenizer_dir):
    tokenizer = Tokenizer.load(tokenizer_dir)
    above = tokenizer.num_token_ids + 5
    parts = list(Transcript(tokenizer).parts([*tokenizer.encode("a"), above]))
    assert parts[-2][0] == f"⟦id {above}⟧" or parts[-1][0] == f"⟦id {above}⟧"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_a_terminal_gets_colours_and_blocks_and_other_places_plain_text(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    page = Page(stream)
    page.line(("⟦</s>⟧", "bold black on yellow"), "[bold]text[/bold]")
    assert "\x1b[" in stream.getvalue()
    assert "[bold]text[/bold]" in stream.getvalue()
    assert page.bar(0.5, 3) == "█▌"
    monkeypatch.setenv("TERM", "dumb")
    assert Page(Terminal()).bar(0.5, 4) == "##"
    assert Page(io.StringIO()).bar(0.0001, 30) == "#"


def test_a_stream_that_cannot_write_a_character_gets_its_number():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Page(stream).line("é ⟦")
    stream.flush()
    assert raw.getvalue() == b"\\xe9 \\u27e6\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"document": 1, "sample": 2}, "--document and --sample are given"),
        ({"document": 12}, "the dataset has 12 documents. give 0 to 11"),
        ({"document": 0, "row": 1}, "--row: a document has none"),
        ({"sample": 0}, "--seq_len is missing"),
        ({"sample": 10**6, "seq_len": 8}, "--sample 1000000 is not there"),
        ({"sample": 0, "seq_len": 10**6}, "use a shorter --seq_len"),
        ({"step": 1, "seq_len": 8}, "--global_batch_size is missing"),
        ({"step": 0, "seq_len": 8, "global_batch_size": 1}, "the first is 1"),
        ({"step": 1, "seq_len": 8, "global_batch_size": 2, "row": 2}, "--row 2 is not there"),
        ({"max_chars": -1}, "--max_chars -1"),
    ],
)
def test_what_is_not_there_is_refused(prepared, capsys, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        shown(capsys, prepared, **options)


def test_without_a_dataset_it_says_how(capsys):
    with pytest.raises(UserError, match="gristmill data inspect OUT"):
        shown(capsys)
