"""What `data stats` counts, and how it says so."""

import json

import pytest

from gristmill.config.data_commands import DataStats
from gristmill.data.look import find, lengths, stats
from gristmill.data.store.dataset import Dataset
from gristmill.util.errors import UserError

from .look_case import write_dataset


@pytest.fixture
def two(tmp_path):
    """Train and val below one folder."""
    write_dataset(tmp_path / "d" / "val", [[10, 6]])
    write_dataset(tmp_path / "d" / "train", [[1, 2, 3, 4], [100, 5]])
    return tmp_path / "d"


def stats_json(capsys, *paths, **options):
    capsys.readouterr()  # what preparing printed
    stats.run(DataStats(data_path=[str(p) for p in paths], json=True, **options))
    return json.loads(capsys.readouterr().out)


def test_lengths_are_those_of_the_documents(two):
    found = lengths.document_lengths(Dataset.open(two / "train"))
    assert (found.documents, found.chunks) == (6, 2)
    assert (found.shortest, found.longest, found.median) == (1, 100, 4)
    assert found.mean == pytest.approx(115 / 6)
    assert [(b.low, b.high, b.documents, b.tokens) for b in found.bins] == [
        (1, 1, 1, 1),
        (2, 3, 2, 5),
        (4, 7, 2, 9),
        (8, 15, 0, 0),
        (16, 31, 0, 0),
        (32, 63, 0, 0),
        (64, 127, 1, 100),
    ]


def test_a_document_cut_into_chunks_counts_once(run_prepare, tmp_path):
    source = tmp_path / "t"
    source.mkdir()
    (source / "a.txt").write_text("word " * 3000, encoding="utf-8")
    (source / "b.txt").write_text("short", encoding="utf-8")
    out = run_prepare("textfiles", source, tmp_path / "out", chunk_tokens=1024)
    dataset = Dataset.open(out)
    found = lengths.document_lengths(dataset)
    assert len(dataset.chunks) > 2
    assert found.documents == dataset.num_documents == 2
    assert sum(b.tokens for b in found.bins) == dataset.num_tokens
    assert found.longest == dataset.num_tokens - found.shortest


def test_many_documents_are_sampled_evenly(tmp_path, monkeypatch):
    folder = write_dataset(tmp_path / "d", [[4] * 10] * 10)
    monkeypatch.setattr(lengths, "MOST_DOCUMENTS", 30)
    found = lengths.document_lengths(Dataset.open(folder))
    assert (found.chunks, found.documents, found.median) == (3, 30, 4)


def test_datasets_are_found_below_a_folder_training_first(two):
    assert find.below([str(two), str(two / "val")]) == [two / "train", two / "val"]
    assert find.train_of(str(two)) == two / "train"
    (two.parent / "raw").mkdir()
    with pytest.raises(UserError, match="is no dataset"):
        stats.run(DataStats(data_path=str(two.parent / "raw")))
    with pytest.raises(UserError, match="there is no dataset"):
        stats.run(DataStats(data_path=[str(two), str(two / "nowhere")]))


def test_json_has_the_numbers_of_each_dataset(two, capsys):
    train, val = stats_json(capsys, two)["datasets"]
    assert (train["tokens"], train["documents"], train["chunks"]) == (115, 6, 2)
    assert (val["tokens"], val["dtype"], val["text_bytes"]) == (16, "uint16", None)
    assert train["bytes"] == sum(p.stat().st_size for p in (two / "train").glob("*.bin"))
    assert train["document_lengths"]["longest"] == 100


def test_a_prepared_dataset_says_where_it_is_from(run_prepare, records, tmp_path, capsys):
    records.write_text(records.read_text() + '{"text": 3}\n{"text": ""}\n')
    out = run_prepare("jsonl", records, tmp_path / "out", max_reject_fraction=0.5)
    found = stats_json(capsys, out)["datasets"][0]
    assert found["bytes_per_token"] == pytest.approx(found["text_bytes"] / found["tokens"])
    assert found["source"]["input_bytes"] == records.stat().st_size
    assert found["source"]["rejects"] == {"field 'text' is not text": 1}
    stats.run(DataStats(data_path=str(out)))
    page = capsys.readouterr().out
    assert "1 field 'text' is not text, 1 without text" in page
    assert f"{found['tokens']:,}" in page
    assert "\x1b" not in page  # not a terminal: plain text
    assert "####" in page


def test_epochs_of_a_run_leave_validation_out(two, capsys):
    other = write_dataset(two.parent / "other", [[50]])
    (by_size, _) = stats_json(capsys, two, other, max_tokens=330)["run"]
    assert (by_size["epochs"], by_size["tokens"]) == (2, 230)
    first, second = stats_json(capsys, two, other, max_tokens=1000, weights=[3, 1])["run"]
    assert (first["tokens"], second["tokens"]) == (750, 250)
    assert second["epochs"] == 5
    stats.run(DataStats(data_path=[str(two), str(other)], max_tokens=1000, weights=[3, 1]))
    assert "5.00" in capsys.readouterr().out


def test_epochs_in_samples_and_steps(two, capsys):
    (share,) = stats_json(capsys, two, seq_len=10, global_batch_size=4)["run"]
    assert share["epoch_samples"] == 0 + 10  # (10 - 1) // 10 and (105 - 1) // 10
    assert share["epoch_tokens"] == 100
    assert share["epoch_steps"] == 2.5
    assert share["epochs"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "--max_tokens 0 is too few"),
        ({"weights": [1]}, "add --max_tokens"),
        ({"weights": [1, 2], "max_tokens": 5}, "--weights has 2 numbers for 1 dataset"),
        ({"weights": [0], "max_tokens": 5}, "share out nothing"),
        ({"global_batch_size": 3}, "add --seq_len"),
    ],
)
def test_options_that_cannot_work_are_refused(two, options, message):
    with pytest.raises(UserError, match=message):
        stats.run(DataStats(data_path=[str(two)], **options))


def test_without_a_dataset_it_says_how():
    with pytest.raises(UserError, match="gristmill data stats OUT"):
        stats.run(DataStats())
