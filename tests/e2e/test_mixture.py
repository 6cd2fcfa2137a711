"""Training on a mixture, from folders and from an object store, through the command line."""

import json
import math
import shutil

import pytest
import torch
from small import MODEL, train_tokenizer, write_novels

from gristmill.cli import main
from gristmill.data.reading.corpus import Corpus, Part
from gristmill.formats.model_dir import load_model
from gristmill.train.batch import TokenBatch


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two prepared datasets, `web` with a validation side and `books` without."""
    root = tmp_path_factory.mktemp("corpora")
    tokenizer = train_tokenizer(write_novels(root / "novels"), root / "tokenizer")
    write_novels(root / "more", files=3, words=400)
    for name, source, more in (
        ("web", "novels", ("--val_fraction", "0.1")),
        ("books", "more", ()),
    ):
        words = ["prepare", "textfiles", "--input_dir", str(root / source)]
        words += ["--output_dir", str(root / name), "--tokenizer_dir", str(tokenizer), *more]
        assert main(words) == 0
    return root


def pretrain(sources, out, *more):
    model = [f"--model_config.{name}={value}" for name, value in MODEL.items()]
    return main(
        [
            *("pretrain", *model, "--data", "Mixture", "--data.sources", json.dumps(sources)),
            *("--out_dir", str(out), "--compile", "off", "--precision", "32-true"),
            *("--train.global_batch_size", "4", "--train.max_steps", "12", "--device", "cpu"),
            *more,
        ]
    )


def rows(out):
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in read if "loss" in row]


def test_a_mixture_trains_and_counts_epochs_of_each_source(corpora, tmp_path, capsys):
    sources = [
        {"path": str(corpora / "web"), "weight": 0.7},
        {"path": str(corpora / "books"), "weight": 0.3},
    ]
    assert pretrain(sources, tmp_path / "run") == 0
    assert "epochs: web " in capsys.readouterr().out
    last = rows(tmp_path / "run")[-1]
    samples = 12 * 4
    assert last["epoch/web"] > 0
    assert last["epoch/books"] > last["epoch/web"]
    assert last["epoch"] * last["samples"] / samples == pytest.approx(last["epoch"])
    # Other weights are other samples: the run in the directory is not this one.
    sources[0]["weight"] = 0.6
    assert pretrain(sources, tmp_path / "run") == 2
    assert "data" in capsys.readouterr().err


def test_validation_is_of_each_source_too(corpora, tmp_path):
    words = ["prepare", "textfiles", "--input_dir", str(corpora / "more"), "--val_fraction", "0.3"]
    words += ["--output_dir", str(tmp_path / "tales")]
    assert main([*words, "--tokenizer_dir", str(corpora / "tokenizer")]) == 0
    places = {"web": corpora / "web", "tales": tmp_path / "tales"}
    assert pretrain([{"path": str(place)} for place in places.values()], tmp_path / "run") == 0
    row = rows(tmp_path / "run")[-1]
    model = load_model(tmp_path / "run/final")
    totals = []
    for name, place in places.items():
        held_out = Corpus.open([Part(place / "val")])
        samples = held_out.held_out(MODEL["max_seq_length"])
        read = samples.batch(0, samples.num_samples)
        batch = TokenBatch.of(read, torch.device("cpu"), document_mask=True)
        micro = next(batch.micro_batches(samples.num_samples))
        with torch.no_grad():
            total = model(micro.inputs, micro.targets, documents=micro.documents).item()
        totals.append((total, batch.num_targets))
        loss = total / batch.num_targets
        assert row[f"val_loss/{name}"] == pytest.approx(loss, rel=1e-5)
        bits = loss / math.log(2) / held_out.bytes_per_token
        assert row[f"val_bits_per_byte/{name}"] == pytest.approx(bits, rel=1e-5)
    whole = sum(total for total, _ in totals) / sum(count for _, count in totals)
    assert row["val_loss"] == pytest.approx(whole, rel=1e-5)


def test_a_source_is_not_read_more_often_than_allowed(corpora, tmp_path, capsys):
    sources = [
        {"path": str(corpora / "web")},
        {"path": str(corpora / "books"), "max_epochs": 0.5, "name": "small"},
    ]
    assert pretrain(sources, tmp_path / "run", "--train.max_steps", "2000") == 2
    error = capsys.readouterr().err
    assert "small would be read" in error
    assert "--train.max_tokens" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sources", "more", "message"),
    [
        ([], (), "no sources"),
        ([{"path": "web", "weight": -1}], (), "no shares"),
        ([{"path": "web"}, {"path": "web"}], (), "one name"),
        ([{"path": "nowhere"}], (), "no dataset"),
        (
            [{"path": "web"}, {"path": "books"}],
            ("--data.stages", "[{from_tokens: 100, weights: {wiki: 1}}]"),
            "names wiki",
        ),
    ],
)
def test_mixtures_that_cannot_be(corpora, tmp_path, capsys, sources, more, message):
    placed = [{**source, "path": str(corpora / source["path"])} for source in sources]
    assert pretrain(placed, tmp_path / "run", *more) == 2
    assert message in capsys.readouterr().err


def test_different_tokenizers_do_not_mix(corpora, tmp_path, capsys):
    write_novels(tmp_path / "text", files=2)
    other = tmp_path / "tokenizer"
    words = ["tokenizer", "train", str(tmp_path / "text"), "--vocab_size", "290"]
    assert main([*words, "--out_dir", str(other)]) == 0
    words = ["prepare", "textfiles", "--input_dir", str(tmp_path / "text")]
    words += ["--output_dir", str(tmp_path / "odd"), "--tokenizer_dir", str(other)]
    assert main(words) == 0
    assert (
        pretrain(
            [{"path": str(corpora / "web")}, {"path": str(tmp_path / "odd")}], tmp_path / "run"
        )
        == 2
    )
    assert "different tokenizers" in capsys.readouterr().err


def test_from_an_object_store_the_losses_are_the_same(corpora, tmp_path, capsys):
    import fsspec

    store = fsspec.filesystem("memory")
    for path in (corpora / "web").rglob("*"):
        if path.is_file():
            store.pipe(
                f"/shelf/web/{path.relative_to(corpora / 'web').as_posix()}", path.read_bytes()
            )
    stages = ("--data.stages", "[{from_tokens: 1500, weights: {books: 1}}]")
    local = [{"path": str(corpora / "web"), "weight": 3}, {"path": str(corpora / "books")}]
    remote = [{"path": "memory://shelf/web", "weight": 3}, local[1]]
    cache = ("--data.cache_dir", str(tmp_path / "cache"))
    assert pretrain(local, tmp_path / "local", *stages) == 0
    assert pretrain(remote, tmp_path / "remote", *stages, *cache) == 0
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("local", "remote")]
    assert losses[0] == losses[1]
    assert list((tmp_path / "cache" / "chunks").iterdir())
    # A cache that is too small for the mixing is refused with the size it needs.
    shutil.rmtree(tmp_path / "cache")
    assert pretrain(remote, tmp_path / "third", *cache, "--data.cache_gb", "0.00001") == 2
    assert "--data.cache_gb" in capsys.readouterr().err


def test_a_batch_that_is_spread_has_the_same_samples_in_another_order(corpora, tmp_path):
    sources = [{"path": str(corpora / "web")}, {"path": str(corpora / "books")}]
    assert pretrain(sources, tmp_path / "near") == 0
    assert pretrain(sources, tmp_path / "spread", "--train.batch_order", "spread") == 0
    near, spread = ([row["loss"] for row in rows(tmp_path / n)] for n in ("near", "spread"))
    assert near == pytest.approx(spread, rel=1e-4)
    for name in ("near", "spread"):
        record = tmp_path / name / "step-00000012" / "checkpoint.json"
        assert ("spread" in json.loads(record.read_text())["stream"]) == (name == "spread")


def test_each_source_has_a_validation_loss_of_its_own(corpora, tmp_path, capsys):
    root = corpora
    words = ["prepare", "textfiles", "--input_dir", str(root / "more"), "--val_fraction", "0.3"]
    words += ["--output_dir", str(tmp_path / "tales"), "--tokenizer_dir", str(root / "tokenizer")]
    assert main(words) == 0
    web, tales = str(root / "web"), str(tmp_path / "tales")
    sources = [{"path": web, "weight": 1}, {"path": tales, "weight": 1}]
    few = ("--eval.max_iters", "1", "--eval.interval", "6")
    capsys.readouterr()
    assert pretrain(sources, tmp_path / "run", *few) == 0
    found = [row for row in rows(tmp_path / "run") if "val_loss" in row]
    assert [row["step"] for row in found] == [6, 12]
    for row in found:
        each = [row["val_loss/web"], row["val_loss/tales"]]
        assert min(each) < row["val_loss"] < max(each)
        for name in ("web", "tales"):
            assert 0 < row[f"val_bits_per_byte/{name}"] < row[f"val_loss/{name}"] / 0.6931
    assert ", tales " in capsys.readouterr().out
    # The whole set at the end is the mean over all targets, whatever the sources.
    last = found[-1]
    share = (last["val_loss"] - last["val_loss/tales"]) / (
        last["val_loss/web"] - last["val_loss/tales"]
    )
    samples = [len_of(path) for path in (web, tales)]
    assert share == pytest.approx(samples[0] / sum(samples), abs=1e-3)


def len_of(path):
    """Samples of the model's length in the held-out part of a dataset."""
    return Corpus.open([Part(f"{path}/val")]).held_out(MODEL["max_seq_length"]).num_samples
