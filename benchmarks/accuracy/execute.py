"""Running what is pending: each run a process of its own, its row appended as soon as it is done."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Event
from time import monotonic, sleep
from typing import IO, Any

import yaml

from benchmarks import jsonl
from benchmarks.accuracy.sweep import Combination, Run
from benchmarks.environment import commit, cpu_name
from blpipe.config_file import dump_config
from blpipe.errors import UserError

_GRACE_SECONDS = 60.0  # for an interrupted run to end, which may be writing a checkpoint
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Options:
    """How and where to run: `jobs` runs at a time, each of `engine`, for at most `minutes`."""

    results: Path
    runs: Path
    engine: str = "local"
    jobs: int = 1
    threads: int | None = None
    minutes: float | None = None


@dataclass(frozen=True)
class Job:
    """A run under way, on one of the places for `Options.jobs` runs at a time."""

    place: int
    combination: Combination
    run: Run
    process: subprocess.Popen[bytes]
    log: IO[bytes]


def read_results(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of results.jsonl by engine and id."""
    return {(row["engine"], row["id"]): row for row in jsonl.read(path)}


def check_machine(runs: Iterable[Run]) -> str:
    """What the runs will run on.

    Raises:
        UserError: a GPU or data that the runs need is not here.
    """
    configs = [run.config for run in runs]
    devices = {config.runtime.device for config in configs}
    gpu = _gpu_name() if devices - {"cpu"} else None
    if "cuda" in devices and gpu is None:
        raise UserError(f"runtime.device: cuda, but torch sees no GPU here; {len(configs)} rows stay pending")
    for root in sorted({config.data.root for config in configs if config.data.name == "arrays" and config.data.root}):
        if not Path(root).exists():
            raise UserError(f"data.root: {root}: no such file")
    return gpu or cpu_name()


def _gpu_name() -> str | None:
    # In a process of its own: this one would hold memory of the GPU for as long as the sweep takes.
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or None


def execute(todo: Iterable[tuple[Combination, Run]], options: Options, device: str,
            say: Callable[[str], None] = print) -> list[str]:
    """Run in this order what has no row yet; returns what failed. A run that was interrupted is gone on with."""
    waiting, failed = deque(todo), list[str]()
    running: list[Job] = []
    end = None if options.minutes is None else monotonic() + 60 * options.minutes
    with _interruption() as interrupted:
        try:
            while (waiting or running) and (end is None or monotonic() < end) and not interrupted.is_set():
                while waiting and len(running) < options.jobs:
                    place = min(set(range(options.jobs)) - {job.place for job in running})
                    running += _begin(place, *waiting.popleft(), options, device, say)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    failed += _end(job, options, device, say)
                sleep(_POLL_SECONDS)
        finally:
            _stop(running)
        for job in running:
            if job.process.returncode == 0:  # just done
                _end(job, options, device, say)
    if interrupted.is_set():
        raise KeyboardInterrupt
    return failed


@contextmanager
def _interruption() -> Iterator[Event]:
    """Set by SIGINT and SIGTERM, which so never fall between a process and its note.

    Children get SIGINT from this process alone; one that ignored it itself would have them ignore it too.
    """
    found = Event()
    before = {number: signal.signal(number, lambda *_: found.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _begin(place: int, combination: Combination, run: Run, options: Options, device: str,
           say: Callable[[str], None]) -> list[Job]:
    """Start a run's process; none where the run is done, or another sweep is at it."""
    options.runs.mkdir(parents=True, exist_ok=True)
    log = (options.runs / f"{_folder(run, options).name}.log").open("ab")
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the process inherits it: held for as long as that lives
    except BlockingIOError:
        log.close()
        say(f"{_title(combination, run)}: another sweep is at it")
        return []
    if (options.engine, run.id) in read_results(options.results):
        log.close()
        return []
    if (_folder(run, options) / "result.json").exists():
        log.close()
        _record(combination, run, options, device, say)
        return []
    resumed = has_checkpoint(_folder(run, options))
    _note_commit(_folder(run, options), resumed)
    say(f"{_title(combination, run)}: {'goes on' if resumed else 'begins'}")
    process = subprocess.Popen(_command(run, options, resumed), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                               env=_environment(place, run, options), start_new_session=True)
    return [Job(place, combination, run, process, log)]


def _end(job: Job, options: Options, device: str, say: Callable[[str], None]) -> list[str]:
    """Record a run whose process has ended, or say why it failed."""
    job.log.close()
    if job.process.returncode == 0:
        _record(job.combination, job.run, options, device, say)
        return []
    path = Path(job.log.name)
    last = "\n".join(f"    {line}" for line in path.read_text(errors="replace").splitlines()[-5:])
    say(f"{_title(job.combination, job.run)}: failed with exit code {job.process.returncode}; {path} ends with\n{last}")
    return [_title(job.combination, job.run)]


def _stop(running: list[Job]) -> None:
    """Have what is running saved and stopped, and wait until nothing of it is left."""
    for job in running:
        job.process.terminate()  # torchrun passes it on
    end = monotonic() + _GRACE_SECONDS
    for job in running:
        try:
            job.process.wait(max(0.0, end - monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()
        job.log.close()


def has_checkpoint(folder: Path) -> bool:
    """Whether a run folder holds a checkpoint to go on from."""
    return any(folder.glob("checkpoints/step_*/checkpoint.json"))


def _folder(run: Run, options: Options) -> Path:
    return options.runs / (run.id if options.engine == "local" else f"{run.id}-{options.engine}")


def _title(combination: Combination, run: Run) -> str:
    return f"{combination.label}, seed {run.seed}"


def _threads(run: Run, options: Options) -> int | None:
    on_gpu = run.config.runtime.device == "cuda"
    return options.threads or run.config.runtime.threads or (None if on_gpu else 1)


def _environment(place: int, run: Run, options: Options) -> dict[str, str]:
    """Of a run's process. Its place is its rank on this machine, by which processes choose among several GPUs."""
    threads = _threads(run, options)
    environment = os.environ | {"LOCAL_RANK": str(place)}
    return environment if threads is None else environment | {"OMP_NUM_THREADS": str(threads)}


def _command(run: Run, options: Options, resumed: bool) -> list[str]:
    folder = _folder(run, options)
    launcher = ["blpipe"]
    if options.engine == "pipeline":
        launcher = ["torch.distributed.run", "--standalone",
                    f"--nproc-per-node={run.config.partition.stage_count}", "-m", "blpipe"]
    if resumed:
        return [sys.executable, "-m", *launcher, "train", "--resume", str(folder)]
    runtime = run.config.runtime.model_copy(update={
        "engine": "auto", "runs": str(options.runs), "progress": False, "threads": _threads(run, options)})
    path = folder.with_name(f"{folder.name}.yaml")
    path.write_text(dump_config(run.config.model_copy(update={"name": folder.name, "runtime": runtime})))
    return [sys.executable, "-m", *launcher, "train", str(path), "--overwrite"]


def _note_commit(folder: Path, resumed: bool) -> None:
    """Note in the run folder of which commit the code is that begins the run, or goes on with it."""
    folder.mkdir(exist_ok=True)
    path = folder / "commits.txt"
    before = path.read_text() if resumed and path.exists() else ""
    path.write_text(f"{before}{commit()}\n")


def _record(combination: Combination, run: Run, options: Options, device: str, say: Callable[[str], None]) -> None:
    row = _row(combination, run, options, device)
    jsonl.append(options.results, row)
    say(f"{_title(combination, run)}: {row['val_accuracy']:.2%}, {row['seconds_per_epoch']:.3g} s an epoch")


def _row(combination: Combination, run: Run, options: Options, device: str) -> dict[str, Any]:
    """What results.jsonl keeps of a finished run. Accuracies are the last epoch's."""
    folder = _folder(run, options)
    result = json.loads((folder / "result.json").read_text())
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    threads = yaml.safe_load((folder / "config.yaml").read_text())["runtime"]["threads"]
    commits = (folder / "commits.txt").read_text().split() if (folder / "commits.txt").exists() else ["unknown"]
    return {
        "id": run.id,
        "name": _title(combination, run),
        "group": combination.group,
        "settings": combination.settings,
        "seed": run.seed,
        "engine": options.engine,
        "val_accuracy": result["val_accuracy"],
        "stage_val_accuracy": result["stage_val_accuracy"],
        "seconds_per_epoch": median(row["train_seconds"] for row in epochs if row["stage"] == 1),
        "peak_memory_bytes": max(stage["peak_memory_bytes"] for stage in result["stages"]),
        "epochs": run.config.train.epochs,
        "commit": "+".join(dict.fromkeys(commits)),
        "versions": result["versions"],
        "device": {"name": device, "cores": os.cpu_count(), "threads": threads,
                   "jobs": options.jobs},
    }
