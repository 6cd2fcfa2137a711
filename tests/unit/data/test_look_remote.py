"""Datasets on object stores are looked at like those on the disk."""

import json

from gristmill.config.data_commands import DataInspect, DataStats
from gristmill.data.look import find, inspect, stats

from .s3 import bucket, s3_server, upload  # noqa: F401  # the first two are fixtures


def test_stats_and_inspect_read_a_bucket(run_prepare, novels, bucket, tmp_path, capsys):  # noqa: F811
    out = run_prepare("textfiles", novels, tmp_path / "out", val_fraction=0.2)
    url = upload(out, f"{bucket}/deep/books")
    assert find.below([bucket]) == [f"{url}/train", f"{url}/val"]
    assert find.train_of(url) == f"{url}/train"
    pages = []
    for place in (str(out), url):
        capsys.readouterr()
        stats.run(DataStats(data_path=place, json=True))
        here = json.loads(capsys.readouterr().out)
        inspect.run(DataInspect(data_path=place, step=2, seq_len=16, global_batch_size=3))
        page = capsys.readouterr().out.splitlines()[1:]
        pages.append(([{**d, "path": ""} for d in here["datasets"]], page))
    assert pages[0] == pages[1]
