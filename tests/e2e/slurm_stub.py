"""`sbatch`, `srun` and `scontrol` of one machine: they run a batch script for real.

`install(folder)` writes the three programs. A job runs behind sbatch's back, as SLURM would run it,
and again when it is queued again; srun starts the tasks and ends the others when one fails. Where
a file `usr1` or `term` appears in the folder, srun passes that signal to all tasks, as SLURM does
before the end of the time or to cancel a job.
"""

from __future__ import annotations

import sys
from pathlib import Path

SBATCH = """
import os, shlex, subprocess, sys
from pathlib import Path

stub = Path(__file__).parent
script = Path(sys.argv[-1])
options = {}
for line in script.read_text().splitlines():
    if line.startswith("#SBATCH "):
        name, _, value = shlex.split(line)[1].partition("=")
        options[name.lstrip("-")] = value
number = str(1 + len(list(stub.glob("job-*"))))
(stub / f"job-{number}").write_text(repr(options))
print(f"{number};cluster")
sys.stdout.flush()
if os.fork():
    sys.exit()
os.setsid()
nodes, tasks = int(options["nodes"]), int(options["ntasks-per-node"])
restarts = 0
with open(options["output"].replace("%j", number), "ab") as log:
    while True:
        env = dict(os.environ, SLURM_JOB_ID=number, SLURM_JOB_NUM_NODES=str(nodes),
                   SLURM_NTASKS=str(nodes * tasks), SLURM_NTASKS_PER_NODE=str(tasks))
        if restarts:
            env["SLURM_RESTART_COUNT"] = str(restarts)
        code = subprocess.run(["bash", script], cwd=options["chdir"], env=env, stdout=log,
                              stderr=log, stdin=subprocess.DEVNULL).returncode
        requeued = stub / f"requeue-{number}"
        if not requeued.exists():
            break
        requeued.unlink()
        restarts += 1
(stub / f"ended-{number}.part").write_text(f"{code} {restarts}")
(stub / f"ended-{number}.part").rename(stub / f"ended-{number}")
"""

SRUN = """
import os, signal, subprocess, sys, time
from pathlib import Path

stub = Path(__file__).parent
words = sys.argv[1:]
options = {}
while words[0].startswith("--"):
    name, _, value = words.pop(0).partition("=")
    options[name] = value
count = int(options.get("--ntasks", os.environ["SLURM_NTASKS"]))
nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
tasks = []
for rank in range(count):
    env = dict(os.environ, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank // nodes),
               SLURM_STEP_NUM_TASKS=str(count), SLURM_NTASKS=str(count),
               SLURM_STEP_NODELIST="localhost", SLURM_LAUNCH_NODE_IPADDR="127.0.0.1")
    tasks.append(subprocess.Popen(words, env=env))
while any(task.poll() is None for task in tasks):
    time.sleep(0.1)
    for name, number in (("usr1", signal.SIGUSR1), ("term", signal.SIGTERM)):
        if (stub / name).exists():
            (stub / name).unlink()
            for task in tasks:
                task.send_signal(number)
    if "--kill-on-bad-exit" in options and any(task.poll() for task in tasks):
        for task in tasks:
            if task.poll() is None:
                task.kill()
sys.exit(max(128 - task.wait() if task.wait() < 0 else task.wait() for task in tasks))
"""

SCONTROL = """
import sys
from pathlib import Path

assert sys.argv[1] == "requeue"
(Path(__file__).parent / f"requeue-{sys.argv[2]}").touch()
"""


def install(folder: Path) -> Path:
    """A folder for PATH with the three programs."""
    folder.mkdir()
    for name, source in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(f"#!{sys.executable}\n{source}")
        (folder / name).chmod(0o755)
    return folder
