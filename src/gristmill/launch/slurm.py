"""A batch job for SLURM: a script that trains, and that queues itself again until it is done.

this command ─ settle ─▶ OUT/slurm/run.yaml, job.sh ─ sbatch ─▶ srun gristmill pretrain
                                                                  │ saved after SIGUSR1
                                              scontrol requeue ◀──┘
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gristmill.config.commands import Prepare, Pretrain, RayWorkers, SlurmJob, Training
from gristmill.config.data import LitData, RawText, Records, TextFiles
from gristmill.config.parse import to_yaml
from gristmill.launch.elsewhere import settle_elsewhere
from gristmill.train.ranges import check_ranges
from gristmill.util.errors import RunError, UserError

FOLDER = "slurm"
JOB, SETTINGS, PREPARE = "job.sh", "run.yaml", "prepare.yaml"
TOLD_TO_SAVE = 128 + 10
"""Exit code of a rank that has saved because of SIGUSR1."""
LEAVE_S = 300
"""How long a job that was told to end stays, so that it is SLURM that ends or requeues it."""

SCRIPT = """\
#!/bin/bash
{options}

# Written by `gristmill {command} --launcher slurm`; submit it again with: sbatch {job}
# SLURM tells the ranks by SIGUSR1 that the time is nearly over: they save, and the job is queued
# again. After a node has failed or others went first, SLURM queues it again by itself.

gristmill=({python} -P -m gristmill)
run={run}
settings={settings}
export PYTHONUNBUFFERED=1
# More threads than cores wait for each other.
cpus=${{SLURM_CPUS_PER_TASK:-$((${{SLURM_CPUS_ON_NODE:-1}} / {devices}))}}
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-$((cpus > 0 ? cpus : 1))}}
{prepare}
for attempt in $(seq 0 {max_restarts}); do
    # What an attempt has begun is neither deleted nor refused by the next one.
    if [ "$run/run.yaml" -nt "$settings" ]; then
        export GRISTMILL_ATTEMPT=1
    else
        export GRISTMILL_ATTEMPT=0
    fi
    srun {srun} "${{gristmill[@]}}" {command} --config "$settings"
    code=$?
    case $code in
        {told})
            echo "gristmill: saved, queued again"
            exec scontrol requeue "$SLURM_JOB_ID" ;;
        143)
            # Cancelled, or to make room for others: SLURM knows which.
            sleep {leave_s}
            exit $code ;;
        0 | 1 | 2 | 130)
            exit $code ;;
    esac
    echo "gristmill: ended with code $code (attempt $attempt of {max_restarts})"
done
exit $code
"""

PREPARE_STEP = """
# Text to tokens, on every machine; what is done already stays.
srun --ntasks={nodes} --ntasks-per-node=1 "${{gristmill[@]}}" prepare --config {prepare} || exit $?
"""


def submit(cfg: Training) -> None:
    """Write the batch job of these settings into the run directory, and submit it.

    Raises UserError for settings that cannot work, RunError where sbatch refuses the job.
    """
    kind, devices = _check(cfg)
    files: dict[str, str] = {}
    if cfg.slurm.prepare == "job":
        out_dir, settings, first = _prepared_in_job(cfg)
        files[PREPARE] = to_yaml(first)
    else:
        job, settings = settle_elsewhere(cfg, kind)
        out_dir = job.out_dir
    out_dir = out_dir.resolve()
    settings = dataclasses.replace(settings, devices=devices)
    folder = out_dir / FOLDER
    files[SETTINGS] = to_yaml(settings)
    files[JOB] = script(cfg, kind, devices, out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"the run directory {out_dir} cannot be written ({error.strerror}). "
            "Choose another --out_dir."
        ) from None
    (folder / JOB).chmod(0o755)
    if not cfg.slurm.submit:
        print(f"wrote {folder / JOB}; submit it with: sbatch {shlex.quote(str(folder / JOB))}")
        return
    number = _sbatch(folder / JOB)
    print(
        f"submitted job {number}: {cfg.num_nodes} x {devices} {kind} devices. Its log is "
        f"{folder / f'{number}.log'}, the run {out_dir}"
    )


def _check(cfg: Training) -> tuple[str, int]:
    """Kind and number of the devices of a machine. Raises UserError for what cannot work."""
    check_ranges(cfg)
    kind, devices, slurm = cfg.device, cfg.devices, cfg.slurm
    if kind not in ("cuda", "cpu"):
        raise UserError(
            f"--device {kind}: which devices the job's machines have cannot be told here. "
            "Give cuda or cpu.",
            {"--device": "cuda"},
        )
    if devices == "auto" and kind == "cuda":
        raise UserError(
            "--devices auto: how many GPUs the job's machines have cannot be told here. Give "
            "their number.",
            {"--devices": 8},
        )
    devices = 1 if devices == "auto" else devices
    for option, value in (
        ("--devices", devices),
        ("--num_nodes", cfg.num_nodes),
        ("--slurm.lead_s", slurm.lead_s),
        ("--slurm.cpus_per_task", slurm.cpus_per_task),
    ):
        if value != "auto" and value < 1:
            raise UserError(f"{option} {value} is too few. Give 1 or more.")
    for option in [*extra_options(slurm), slurm.partition, slurm.account, slurm.time]:
        if option is not None and not option.isprintable():
            raise UserError(f"an option of sbatch has characters that no option has ({option!r}).")
    for option in extra_options(slurm):
        if not option.startswith("-"):
            raise UserError(
                f"--slurm.extra {option!r} is no option of sbatch. Write them as --name=value."
            )
    return kind, devices


def extra_options(slurm: SlurmJob) -> list[str]:
    """The user's own options of sbatch, one each."""
    if isinstance(slurm.extra, str):
        return shlex.split(slurm.extra)
    return list(slurm.extra)


def script(cfg: Training, kind: str, devices: int, out_dir: Path) -> str:
    """The batch script: nodes, time, signal, and the loop around srun."""
    slurm, folder = cfg.slurm, out_dir / FOLDER
    options = [
        f"--job-name={out_dir.name}",
        f"--nodes={cfg.num_nodes}",
        f"--ntasks-per-node={devices}",
        *([f"--gpus-per-node={devices}"] if kind == "cuda" else []),
        *([f"--cpus-per-task={slurm.cpus_per_task}"] if slurm.cpus_per_task != "auto" else []),
        *([f"--partition={slurm.partition}"] if slurm.partition else []),
        *([f"--account={slurm.account}"] if slurm.account else []),
        *([f"--time={slurm.time}"] if slurm.time else []),
        # To the ranks, not to this script.
        f"--signal=USR1@{slurm.lead_s}",
        "--requeue",
        "--open-mode=append",
        f"--chdir={os.getcwd()}",
        f"--output={folder / '%j.log'}",
        *extra_options(slurm),
    ]
    srun = ["--kill-on-bad-exit=1"]
    if slurm.cpus_per_task != "auto":
        srun.append(f"--cpus-per-task={slurm.cpus_per_task}")  # srun does not take it from the job
    prepare = ""
    if slurm.prepare == "job":
        file = shlex.quote(str(folder / PREPARE))
        prepare = PREPARE_STEP.format(nodes=cfg.num_nodes, prepare=file)
    return SCRIPT.format(
        options="\n".join(f"#SBATCH {shlex.quote(option)}" for option in options),
        job=shlex.quote(str(folder / JOB)),
        python=shlex.quote(sys.executable),
        run=shlex.quote(str(out_dir)),
        settings=shlex.quote(str(folder / SETTINGS)),
        devices=devices,
        prepare=prepare,
        max_restarts=cfg.max_restarts,
        command=cfg.command,
        srun=shlex.join(srun),
        told=TOLD_TO_SAVE,
        leave_s=LEAVE_S,
    )


def _prepared_in_job(cfg: Training) -> tuple[Path, Pretrain, Prepare]:
    """Run directory, settings of the training and of the preparation before it, in the job."""
    data = cfg.data if isinstance(cfg, Pretrain) else None
    if not isinstance(cfg, Pretrain) or not isinstance(data, RawText):
        raise UserError(
            "--slurm.prepare job: only raw text is prepared (--data TextFiles and its like). "
            "Leave it out.",
            {"--slurm.prepare": None},
        )
    if cfg.out_dir is None or cfg.tokenizer_dir is None or data.val_data_path is not None:
        raise UserError(
            "--slurm.prepare job needs --out_dir and --tokenizer_dir, and holds out a share of the "
            "text (--data.val_fraction), not --data.val_data_path.",
            {"--slurm.prepare": None} if cfg.out_dir and cfg.tokenizer_dir else None,
        )
    out_dir = Path(cfg.out_dir)
    dataset = str((out_dir / "data").resolve())
    first = Prepare(
        layout=data.layout,
        input_dir=data.train_data_path,
        output_dir=dataset,
        tokenizer_dir=cfg.tokenizer_dir,
        pattern=data.pattern,
        text_field=data.text_field if isinstance(data, Records) else None,
        separator=data.separator if isinstance(data, TextFiles) else None,
        val_fraction=data.val_fraction,
        bos=data.bos,
        eos=data.eos,
        seed=data.seed,
        num_workers=data.num_workers,
        executor="array",
    )
    settings = dataclasses.replace(
        cfg,
        data=LitData(data_path=dataset, seed=data.seed),
        tokenizer_dir=None,
        out_dir=str(out_dir.resolve()),
        launcher="auto",
        ray=RayWorkers(),
        slurm=SlurmJob(),
    )
    return out_dir, settings, first


def _sbatch(script: Path) -> str:
    """The number of the job that was submitted."""
    command: Sequence[str] = ["sbatch", "--parsable", str(script)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            f"there is no sbatch on this machine. The script is {script}: submit it on one that "
            "has it, and write others with --slurm.submit false.",
            {"--slurm.submit": "false"},
        ) from None
    if done.returncode:
        reason = (done.stderr or done.stdout).strip()
        raise RunError(f"sbatch refused {script} ({reason}). Change the --slurm options.")
    return done.stdout.strip().partition(";")[0]
