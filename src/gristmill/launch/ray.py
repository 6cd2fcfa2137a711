"""Training on a Ray cluster: Ray Train places the workers, watches them and starts them again.

    this command ─ settle ─▶ OUT/ray/<time>/run.yaml ─▶ a Ray worker for each device
                                                          └ gristmill pretrain --config run.yaml
    this command ◀─ OUT/ray/<time>/: logs, how it ended ◀──┘

A rank is a process of its own, the very one that a launcher of torch starts, so that what it
computes is the same. Ray's worker only starts and watches it; nothing of the training goes through
Ray, and what is known of it lies in the run directory, which all machines see. Ray's workers import
this file; what only the command needs, torch above all, is imported where it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from gristmill import __version__
from gristmill.config.commands import RayCluster, Training
from gristmill.config.sections import Parallel
from gristmill.launch.elsewhere import settle_elsewhere, stamp
from gristmill.util.errors import Interrupted, RunError, UserError
from gristmill.util.reports import FINAL, LAUNCHER, REPORTS, Report, read_report

POLL_S = 0.5
OTHERS_LEAVE_S, OTHERS_SAVE_S = 10.0, 120.0
"""How long ranks may run on after one has ended for good, and after one has saved and left."""
RESIZE_S = 60.0
"""How often Ray looks whether machines have joined."""

ENDED, SIGNAL = "ended.json", "signal"
SETTINGS, SETTINGS_AGAIN = "run.yaml", "run-again.yaml"


@dataclass(frozen=True)
class Crew:
    """The workers of a run, as Ray is asked for them."""

    kind: str
    """Kind of device: cuda or cpu."""
    per_node: int
    most: int
    fewest: int
    num_cpus: float

    @property
    def resources(self) -> dict[str, float]:
        """What one worker takes."""
        return {"CPU": self.num_cpus} | ({"GPU": 1.0} if self.kind == "cuda" else {})


def train_on_ray(cfg: Training) -> None:
    """Train as `cfg` says on a Ray cluster, to the end.

    Raises what one process would: UserError for a mistake, RunError for a failure, Interrupted
    after a signal that the workers have obeyed.
    """
    from gristmill.data.preparation.executors.ray import connected
    from gristmill.train.directory import RUN_FILE

    _check(cfg)
    with connected(cfg.ray.address, "--launcher") as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        crew = crew_of(cfg, nodes)
        together = RayCluster(address=cfg.ray.address) if cfg.num_nodes > 1 else None
        job, settings = settle_elsewhere(cfg, crew.kind, together)
        folder = _folder(job.out_dir.resolve(), settings)
        _check_nodes(ray, crew, folder)
        _say_if_too_few(crew, nodes)
        order = {
            "folder": str(folder),
            "record": str(job.out_dir.resolve() / RUN_FILE),
            "before": stamp(job.out_dir / RUN_FILE),
            "num_cpus": crew.num_cpus,
            "command": cfg.command.split(),
            "directory": os.getcwd(),
            "path": [path or os.getcwd() for path in sys.path],
            "threads": os.environ.get("OMP_NUM_THREADS"),
        }
        _watch(folder, _trainer(cfg, crew, folder, order).fit)


def _check(cfg: Training) -> None:
    """Refuse settings that cannot work, whatever the cluster."""
    if cfg.device == "mps":
        raise UserError("--device mps: Ray places no such devices. Use --launcher local.")
    if cfg.num_nodes < 1:
        raise UserError(f"--num_nodes {cfg.num_nodes}: give 1 or more.", {"--num_nodes": 1})
    if cfg.ray.num_cpus != "auto" and cfg.ray.num_cpus <= 0:
        raise UserError(f"--ray.num_cpus {cfg.ray.num_cpus}: give 1 or more.")
    fewest = cfg.ray.min_nodes
    if fewest is None:
        return
    if not 1 <= fewest <= cfg.num_nodes:
        raise UserError(
            f"--ray.min_nodes {fewest} is not between 1 and --num_nodes {cfg.num_nodes}.",
            {"--ray.min_nodes": 1},
        )
    if cfg.parallel != Parallel():
        raise UserError(
            "--ray.min_nodes lets the number of devices change, and --parallel fixes it. Leave one "
            "of them out.",
            {"--ray.min_nodes": None},
        )


def crew_of(cfg: Training, nodes: list[dict[str, float]]) -> Crew:
    """The workers for these settings on a cluster whose machines have these resources.

    Of `auto`: GPUs where the cluster has some, as many on a machine as the largest has; on CPUs one
    worker a machine. CPUs are those of the `num_nodes`-th largest machine, shared by its workers.
    """
    most_gpus = int(max((node.get("GPU", 0) for node in nodes), default=0))
    kind = cfg.device
    if kind == "auto":
        kind = "cuda" if most_gpus else "cpu"
    per_node = cfg.devices
    if per_node == "auto":
        per_node = max(1, most_gpus) if kind == "cuda" else 1
    if per_node < 1:
        raise UserError(f"--devices {per_node}: give 1 or more.", {"--devices": 1})
    num_cpus = cfg.ray.num_cpus
    if num_cpus == "auto":
        fit = [n for n in nodes if kind == "cpu" or n.get("GPU", 0) >= per_node]
        cpus = sorted((n.get("CPU", 0) for n in fit), reverse=True)
        share = cpus[min(cfg.num_nodes, len(cpus)) - 1] // per_node if cpus else 0
        num_cpus = float(max(1, share))
    fewest = cfg.num_nodes if cfg.ray.min_nodes is None else cfg.ray.min_nodes
    return Crew(kind, per_node, cfg.num_nodes * per_node, fewest * per_node, num_cpus)


def _folder(out_dir: Path, settings: Training) -> Path:
    """A folder of this command's own in the run directory, with the settings that workers read."""
    from gristmill.config.parse import to_yaml

    folder = out_dir / "ray" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        folder.mkdir(parents=True)
        (folder / SETTINGS).write_text(to_yaml(settings), encoding="utf-8")
        # What the first attempt has begun is neither deleted nor refused by the next one.
        resume = "auto" if settings.resume is False else settings.resume
        again = dataclasses.replace(settings, overwrite=False, resume=resume)
        (folder / SETTINGS_AGAIN).write_text(to_yaml(again), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"the run directory {out_dir} cannot be written ({error.strerror}). "
            "Choose another --out_dir."
        ) from None
    return folder


def _check_nodes(ray: Any, crew: Crew, folder: Path) -> None:
    """Raise UserError where a machine of the cluster lacks this package or the run directory."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    asked = []
    for node in ray.nodes():
        if node["Alive"] and all(
            node["Resources"].get(name, 0) >= wanted for name, wanted in crew.resources.items()
        ):
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = look.options(scheduling_strategy=place).remote(str(folder / SETTINGS))
            asked.append((node["NodeManagerHostname"], task))
    for host, task in asked:
        try:
            version, there = ray.get(task)
        except ray.exceptions.RayTaskError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"{host} cannot run gristmill ({reason}). Install gristmill {__version__} with its "
                "extra ray on every machine of the cluster."
            ) from None
        except ray.exceptions.RayError:
            continue  # it has just left
        if version != __version__:
            raise UserError(
                f"{host} has gristmill {version}, this machine {__version__}. Install the same "
                "version on every machine of the cluster."
            )
        if not there:
            raise UserError(
                f"{host} does not see {folder.parent.parent}. Give an --out_dir in a folder that "
                "all machines of the cluster share."
            )


def _look(file: str) -> tuple[str, bool]:
    """What a machine has: the version of this package, and whether it sees a file."""
    deadline = time.monotonic() + 10.0
    while not Path(file).exists() and time.monotonic() < deadline:
        time.sleep(POLL_S)  # shared storage shows a new file late
    return __version__, Path(file).exists()


def _say_if_too_few(crew: Crew, nodes: list[dict[str, float]]) -> None:
    room = sum(
        int(min(node.get(name, 0) // wanted for name, wanted in crew.resources.items()))
        for node in nodes
    )
    if room < crew.fewest:
        takes = " and ".join(f"{wanted:g} {name}" for name, wanted in crew.resources.items())
        _say(
            f"the cluster has room for {room} of {crew.fewest} workers, which take {takes} each; "
            "waiting for machines to join (Ctrl-C leaves)"
        )


def _trainer(cfg: Training, crew: Crew, folder: Path, order: dict[str, Any]) -> Any:
    """Ray Train's trainer of these workers.

    The one that its TorchTrainer is made of: that would open a process group in Ray's own
    processes, and the ranks open theirs.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.backend import Backend, BackendConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    class Devices(Backend):
        """Every worker of a machine sees its GPUs, and takes the one of its local rank."""

        share_cuda_visible_devices = True

    class DevicesConfig(BackendConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return Devices

    return DataParallelTrainer(
        serve,
        train_loop_config=order,
        backend_config=DevicesConfig(),
        scaling_config=ScalingConfig(
            num_workers=crew.most if crew.fewest == crew.most else (crew.fewest, crew.most),
            use_gpu=crew.kind == "cuda",
            resources_per_worker=crew.resources,
            placement_strategy="SPREAD" if crew.per_node == 1 else "PACK",
            elastic_resize_monitor_interval_s=RESIZE_S,
        ),
        run_config=RunConfig(
            name="state",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=cfg.max_restarts),
        ),
    )


def _watch(folder: Path, fit: Callable[[], Any]) -> None:
    """Wait for the end, show what rank 0 writes, pass signals on; raises how it ended."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            fit()
        except BaseException as error:
            failures.append(error)

    # Not in this thread: Ray's own way to end on Ctrl-C would leave no time to save.
    thread = threading.Thread(target=run, daemon=True)
    log = _Log(folder)
    with _signals(folder) as received:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
            log.show()
    log.show()
    raise_ending(folder, failures[0] if failures else None, received)


@contextlib.contextmanager
def _signals(folder: Path) -> Iterator[list[int]]:
    """Leave word of a signal for the workers; a second Ctrl-C leaves at once."""
    from gristmill.launch.local import FORWARDED

    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        (folder / SIGNAL).write_text(str(number))

    earlier: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in FORWARDED:
            if signal.getsignal(number) != signal.SIG_IGN:
                earlier[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


class _Log:
    """What rank 0 writes, in all attempts, shown here."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._attempt = 0
        self._shown = 0

    def show(self) -> None:
        """Show what is new."""
        while True:
            with contextlib.suppress(OSError), self._file(self._attempt).open("rb") as log:
                log.seek(self._shown)
                new = log.read()
                self._shown += len(new)
                sys.stderr.write(new.decode("utf-8", "replace"))
                sys.stderr.flush()
            if not self._file(self._attempt + 1).exists():
                return
            self._attempt, self._shown = self._attempt + 1, 0
            _say(f"the workers were started again (restart {self._attempt})")

    def _file(self, attempt: int) -> Path:
        return attempt_folder(self._folder, attempt) / "rank-0.log"


def raise_ending(folder: Path, failure: BaseException | None, received: list[int]) -> None:
    """Raise how the run ended, unless it ended well."""
    with contextlib.suppress(FileNotFoundError):
        ended = json.loads((folder / ENDED).read_text(encoding="utf-8"))
        raise Report(**ended["report"]).error(ended["rank"], ended["world"])
    if failure is None:
        return
    if received:
        name = signal.Signals(received[0]).name
        raise Interrupted(received[0], f"{name}: stopped")
    reasons = [str(error) for error in getattr(failure, "worker_failures", {}).values()]
    lines = (reasons[0] if reasons else str(failure)).strip().splitlines()
    raise RunError(
        f"training on Ray failed ({lines[-1] if lines else type(failure).__name__}). The logs are "
        f"in {folder}; the same command goes on from the newest checkpoint."
    ) from failure


def attempt_folder(folder: Path, attempt: int) -> Path:
    """Where the ranks of an attempt, counted from 0, write."""
    return folder / f"attempt-{attempt}"


def serve(order: dict[str, Any]) -> None:
    """Start and watch one rank: what Ray runs in each of its workers.

    Raises RuntimeError where another attempt may do better; other endings are left in the folder.
    """
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero
    from ray.util import get_node_ip_address

    context, folder = get_context(), Path(order["folder"])
    rank, world = context.get_world_rank(), context.get_world_size()
    place = _meet(order, get_node_ip_address()) if rank == 0 else None
    place = broadcast_from_rank_zero(place)
    if (folder / ENDED).exists():
        return
    meeting = attempt_folder(folder, place["attempt"])
    environment = _environment(order) | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "MASTER_ADDR": place["address"],
        "MASTER_PORT": place["port"],
        REPORTS: str(meeting),
        LAUNCHER: str(os.getpid()),
    }
    command = [sys.executable, "-P", "-m", "gristmill", *order["command"]]
    command += ["--config", place["settings"]]
    with (meeting / f"rank-{rank}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=order["directory"] if Path(order["directory"]).is_dir() else None,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            code = _wait(process, folder)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if code:
        _end(folder, meeting, rank, world, code)


def _meet(order: dict[str, Any], address: str) -> dict[str, Any]:
    """Where the ranks of this attempt meet, and which one it is; made by rank 0."""
    folder, attempt = Path(order["folder"]), 0
    while attempt_folder(folder, attempt).exists():
        attempt += 1
    attempt_folder(folder, attempt).mkdir()
    settings = SETTINGS if stamp(Path(order["record"])) == order["before"] else SETTINGS_AGAIN
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
        listener.bind((address, 0))
        port = listener.getsockname()[1]
    return {
        "attempt": attempt,
        "settings": str(folder / settings),
        "address": address,
        "port": str(port),
    }


def _environment(order: dict[str, Any]) -> dict[str, str]:
    """What a rank is told beside its place in the world."""
    environment = dict(os.environ)
    # Ray sets it to 1 for workers with GPUs.
    environment["OMP_NUM_THREADS"] = order["threads"] or str(max(1, int(order["num_cpus"])))
    # A module of the user's own is found where the command finds it.
    environment["PYTHONPATH"] = os.pathsep.join(
        dict.fromkeys([path for path in sys.path if path] + order["path"])
    )
    return environment


def _wait(process: subprocess.Popen[bytes], folder: Path) -> int:
    """The rank's exit code; signals are passed on, and it is ended once another ended for good."""
    deadline, told = None, False
    while process.poll() is None:
        time.sleep(POLL_S)
        if not told and (folder / SIGNAL).exists():
            with contextlib.suppress(ValueError):  # not written to its end yet
                process.send_signal(int((folder / SIGNAL).read_text()))
                told = True
        if deadline is None and (folder / ENDED).exists():
            deadline = time.monotonic() + (OTHERS_SAVE_S if told else OTHERS_LEAVE_S)
        if deadline is not None and time.monotonic() > deadline:
            process.kill()
            process.wait()
            return 0  # how the run ended is told already
    return process.returncode


def _end(folder: Path, meeting: Path, rank: int, world: int, code: int) -> None:
    """Leave word of an ending that another attempt would only repeat; raise for others."""
    if (folder / ENDED).exists():
        return
    said = read_report(meeting, rank)
    if said is not None and said.kind in FINAL:
        content = {"rank": rank, "world": world, "report": dataclasses.asdict(said)}
        temporary = meeting / f"ended-{rank}"
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, folder / ENDED)
        return
    if said is not None:
        raise RuntimeError(f"worker {rank} of {world}: {said.message}")
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    raise RuntimeError(f"worker {rank} of {world} {how}")


def _say(line: str) -> None:
    sys.stderr.write(f"gristmill: {line}\n")
    sys.stderr.flush()
