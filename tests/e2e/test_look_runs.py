"""What `data inspect --run` shows is what training read, or will read, for every kind of run."""

import json
import re

import numpy as np
import pytest
import xxhash
from tests.unit.data.conftest import make_text, save_tokenizer
from tests.unit.data.test_look_inspect import all_documents

from gristmill.cli import main
from gristmill.data.look import find
from gristmill.data.reading.chunk_cache import ChunkCache
from gristmill.data.store.dataset import Dataset

MODEL = {
    "num_layers": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 32,
    "vocab_size": 448,
    "max_seq_length": 32,
}
# From step 8 on only books: 4 rows of 32 tokens a step.
STAGE = ("--data.stages", json.dumps([{"from_tokens": 7 * 4 * 32, "weights": {"books": 1}}]))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two prepared datasets of several chunks, with documents longer and shorter than a row."""
    root = tmp_path_factory.mktemp("corpora")
    tokenizer = save_tokenizer(root / "tokenizer", bos="<s>", eos="</s>")
    for number, (name, documents) in enumerate((("web", 400), ("books", 150))):
        (root / f"{name}-text").mkdir()
        texts = [make_text(1000 * number + n, 1 + n % 13) for n in range(documents)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (root / f"{name}-text" / "all.jsonl").write_text(lines, encoding="utf-8")
        words = ["prepare", "jsonl", "--input_dir", str(root / f"{name}-text")]
        words += ["--output_dir", str(root / name), "--tokenizer_dir", str(tokenizer)]
        assert main([*words, "--chunk_tokens", "1024", "--eos", "1"]) == 0
    return root


@pytest.fixture
def trained(monkeypatch):
    """The digests of the batches that training takes, by step, as they reach the model."""
    pytest.importorskip("torch")
    from gristmill.train import fit
    from gristmill.train.job import Job

    digests: dict[int, list[str]] = {}
    numbers: list[int] = []
    begin, step, put = fit.reseed, fit.train_step, Job.on_device

    def reseed(seed, number, *rank):
        numbers.append(number + 1)
        begin(seed, number, *rank)

    def train_step(model, optimizer, batch, *rest, **options):
        assert np.array_equal(batch.inputs.numpy(), batch.read[:, :-1])
        digest = xxhash.xxh3_64_hexdigest(batch.read.data)
        digests.setdefault(numbers[-1], []).append(digest)
        return step(model, optimizer, batch, *rest, **options)

    def on_device(job, batch):
        there = put(job, batch)
        there.read = np.ascontiguousarray(batch.tokens, dtype="<i8")
        return there

    monkeypatch.setattr(fit, "reseed", reseed)
    monkeypatch.setattr(Job, "on_device", on_device)
    monkeypatch.setattr(fit, "train_step", train_step)
    return digests


def mixed(corpora, web=None):
    web = {"path": web or str(corpora / "web"), "weight": 0.6}
    sources = [web, {"path": str(corpora / "books"), "weight": 0.4}]
    return ("--data", "Mixture", "--data.sources", json.dumps(sources))


def pretrain(out, *more, steps=12):
    model = [f"--model_config.{name}={value}" for name, value in MODEL.items()]
    words = ["pretrain", *model, "--out_dir", str(out), "--compile", "off", "--device", "cpu"]
    words += ["--precision", "32-true", "--train.global_batch_size", "4", "--train.max_steps"]
    return main([*words, str(steps), "--train.save_interval", "3", *more])


@pytest.fixture
def inspected(capsys):
    """The page of `data inspect` with these words."""

    def page(*words):
        capsys.readouterr()
        assert main(["data", "inspect", *map(str, words)]) == 0
        return capsys.readouterr().out

    return page


def digest_of(page):
    return re.search(r"· batch ([0-9a-f]{16})$", page, re.MULTILINE)[1]


def sources_of(page):
    return re.findall(r"^row \d+: sample [\d,]+ · (\w+) · chunk-", page, re.MULTILINE)


@pytest.mark.slow
def test_a_mixture_with_a_stage_over_a_resume(corpora, trained, inspected, tmp_path, monkeypatch):
    out, data = tmp_path / "run", (*mixed(corpora), *STAGE)
    source = "def hook(run, stats):\n    if run.state.step == 8: raise OSError('the power went')\n"
    (tmp_path / "power_cut.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert pretrain(out, *data, "--hook", "power_cut:hook") == 1
    seen = [digest_of(inspected("--run", out, "--step", step)) for step in range(1, 9)]
    assert [[digest] for digest in seen] == [trained[step] for step in range(1, 9)]

    assert pretrain(out, *data) == 0
    assert len(trained[7]) == 2, "the run went on from the checkpoint after step 6"
    pages = [inspected("--run", out, "--step", step) for step in range(1, 17)]
    for step in range(1, 13):
        assert set(trained[step]) == {digest_of(pages[step - 1])}
    assert set(sources_of("".join(pages[:7]))) == {"web", "books"}
    assert sources_of("".join(pages[7:])) == ["books"] * 4 * 9
    assert "epochs read before: web 0." in pages[9]

    # What a longer run will read is shown before it does.
    assert "the run ends before it" in pages[12]
    assert pretrain(out, *data, steps=16) == 0
    assert [trained[step] for step in range(13, 17)] == [[digest_of(p)] for p in pages[12:]]


def test_a_mixture_from_an_object_store(corpora, trained, inspected, tmp_path, monkeypatch):
    import fsspec

    caches = []

    class Seen(ChunkCache):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            caches.append(self)

    monkeypatch.setattr(find, "ChunkCache", Seen)

    store = fsspec.filesystem("memory")
    for path in (corpora / "web").rglob("*"):
        if path.is_file():
            name = path.relative_to(corpora / "web").as_posix()
            store.pipe(f"/look/web/{name}", path.read_bytes())
    out, cache = tmp_path / "run", ("--data.cache_dir", str(tmp_path / "cache"))
    data = mixed(corpora, "memory://look/web")
    assert pretrain(out, *data, *STAGE, *cache, steps=5) == 0
    for step in range(1, 6):
        page = inspected("--run", out, "--step", step)
        assert trained[step] == [digest_of(page)]
        assert "web: memory://look/web\n" in page
        # Only what is looked at comes here.
        shown = set(re.findall(r" · web · (chunk-\S+),", page))
        assert caches[-1].downloads == len(shown) < len(Dataset.open(corpora / "web").chunks)


@pytest.fixture
def packed(corpora, tmp_path, monkeypatch, trained):
    """A packed run of the mixture."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "packed"
    assert pretrain(out, *mixed(corpora), *STAGE, "--train.packing", "best_fit") == 0
    return out


def pieces_of(page):
    """Each piece shown with --ids: its document, its first token there, its ids, its end."""
    found = []
    for line in page.splitlines():
        if begin := re.fullmatch(r"⟦document ([\d,]+)(?:, from its token ([\d,]+))?⟧", line):
            document, before = (int((part or "0").replace(",", "")) for part in begin.groups())
            found.append([document, before, [], None])
        elif line.startswith(("⟦end of", "⟦document")):
            found[-1][3] = line.startswith("⟦end")
        elif known := re.match(r" *\d+ +(\d+)  ", line):
            found[-1][2].append(int(known[1]))
    return found


def test_packed_rows_show_every_piece_as_what_it_is(corpora, packed, trained, inspected):
    documents = [d for n in ("web", "books") for d in all_documents(Dataset.open(corpora / n))]
    seen = set()
    for step in (1, 6, 12):
        page = inspected("--run", packed, "--step", step, "--ids", "true", "--max_chars", "0")
        assert trained[step] == [digest_of(page)]
        for document, before, ids, ends in pieces_of(page):
            stop = before + len(ids)
            assert ids == documents[document][before:stop]
            assert ends == (stop == len(documents[document]))
            seen.add((before > 0, ends))
        for row in page.split("\nrow ")[1:]:
            there = sum(len(piece[2]) for piece in pieces_of(row))
            padding = re.search(r"⟦padding: (\d+) token", row)
            assert there + (int(padding[1]) if padding else 0) == 33
            assert f"of documents, {there} of 33 tokens" in row
    assert seen >= {(False, True), (False, False), (True, True)}


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_samples_and_documents_have_the_numbers_of_the_rows(corpora, packed, inspected, packing):
    out = packed
    if packing == "concat":
        out = packed.with_name("run")
        assert pretrain(out, *mixed(corpora), steps=2) == 0
    everything = ("--ids", "true", "--max_chars", "0")
    page = inspected("--run", out, "--step", 2, *everything)
    for row in page.split("\nrow ")[1:]:
        number = re.match(r"\d+: sample ([\d,]+) · ", row)[1].replace(",", "")
        alone = inspected("--run", out, "--sample", number, *everything)
        assert pieces_of(alone) == pieces_of(row)
        document, before, ids, _ = pieces_of(row)[0]
        whole = inspected("--run", out, "--document", document, *everything)
        assert sources_of("row " + row)[0] in whole
        assert pieces_of(whole)[0][2][before : before + len(ids)] == ids


def test_data_that_is_not_the_runs_is_refused(corpora, tmp_path, capsys):
    out = tmp_path / "run"
    assert pretrain(out, *mixed(corpora), steps=1) == 0
    words = ["data", "inspect", str(corpora / "web"), "--run", str(out), "--step", "1"]
    assert main(words) == 2
    assert "is not what the run in" in capsys.readouterr().err
    # The weights belong to what a run reads.
    record = (out / "run.yaml").read_text()
    (out / "run.yaml").write_text(record.replace("weight: 0.6", "weight: 0.5"))
    assert main(["data", "inspect", "--run", str(out), "--step", "1"]) == 2
    assert "is not what the run in" in capsys.readouterr().err


def test_runs_on_raw_text_and_on_modules_of_ones_own(
    corpora, trained, inspected, tmp_path, monkeypatch
):
    raw = ("--data", "Jsonl", "--data.train_data_path", str(corpora / "web-text"))
    raw += ("--data.cache_dir", str(tmp_path / "cache"), "--data.seed", "5")
    tokenizer = ("--tokenizer_dir", str(corpora / "tokenizer"))
    source = f"""
from dataclasses import dataclass
from gristmill.config.data import DataModule
from gristmill.data.reading.corpus import LaterWeights, Part
from gristmill.data.modules import Datasets

@dataclass
class Own(DataModule):
    share: float

    def datasets(self, tokenizer_dir):
        parts = (Part({str(corpora / "web")!r}, self.share), Part({str(corpora / "books")!r}))
        return Datasets(parts, None, 9, (LaterWeights(400, (0.0, 1.0)),))
"""
    (tmp_path / "own_data.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    own = ("--data", "own_data:Own", "--data.share", "0.25")
    for name, data in (("raw", (*raw, *tokenizer)), ("own", own)):
        trained.clear()
        assert pretrain(tmp_path / name, *data, steps=4) == 0
        for step in range(1, 5):
            page = inspected("--run", tmp_path / name, "--step", step)
            assert trained[step] == [digest_of(page)]
    assert "seed 9 " in page
    assert sources_of(page) == ["books"] * 4
