"""MLflow: one run of it per run directory, however often that is restarted."""

from __future__ import annotations

import re
import time
from pathlib import Path

from gristmill.track.metrics import Row

ID_FILE = "mlflow_id"
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]", re.ASCII)


class MLflow:
    """Sends rows to a run of the experiment `project`, whose id is kept in `out_dir/mlflow_id`.

    Where runs are kept is the package's own affair (MLFLOW_TRACKING_URI). A restart joins the run;
    steps it already has are not sent twice. Raises ImportError without the package, and the
    package's own errors when its store cannot be reached.
    """

    def __init__(self, out_dir: Path, project: str, run: str) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()
        self._metric = mlflow.entities.Metric
        self._sent_step = -1
        file = out_dir / ID_FILE
        if file.exists():
            self._id = file.read_text().strip()
            earlier = self._client.get_metric_history(self._id, "tokens")
            self._sent_step = max((metric.step for metric in earlier), default=-1)
            self._client.update_run(self._id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        self._id = self._client.create_run(experiment, run_name=run).info.run_id
        out_dir.mkdir(parents=True, exist_ok=True)
        file.write_text(self._id + "\n")

    def log(self, row: Row, step: int) -> None:
        """Send a row in one request."""
        if step <= self._sent_step:
            return
        now = int(time.time() * 1000)
        metrics = [self._metric(_name(key), float(row[key]), now, step) for key in row]
        self._client.log_batch(self._id, metrics=metrics)

    def text(self, name: str, text: str, step: int) -> None:
        """Send a text as a file of the run."""
        if step > self._sent_step:
            self._client.log_text(self._id, text, f"{_name(name)}/step-{step:08}.txt")

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._id)


def _name(key: str) -> str:
    """A name of a metric as MLflow takes it."""
    return _NOT_IN_NAMES.sub("_", key)
