"""Run the commands of a file in benchmarks/commands/ or claims/, as far as they are not finished.

python -m benchmarks.run benchmarks/commands/rwr.sh --seeds 0 1 2 --jobs 2

Such a file is a shell script: SEED=0 bash benchmarks/commands/rwr.sh runs it as well, one command
after the other. Here a paragraph with its seed is a job, and jobs run side by side. The commands of
a job run one after the other: those that go on with a run, or take what an earlier one has drawn.

Each command names the folder of its run by --output-dir, or by --resume. What is finished there is
written into wall_time.json and not run again; a run that was stopped is resumed. A pattern stands
for the finished runs that match: where there are more of them, the command is run again.
"""

import glob
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
"""Those that this process may use, of all that there are."""


@dataclass
class Args:
    file: tyro.conf.Positional[Path]
    """Of commands."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """What stands for $SEED, in turn; a command without it runs once."""
    jobs: int = 1
    """Jobs side by side, the cores shared out among them.

    More are done in an hour, but each takes longer.
    """


def read_commands(file: Path) -> list[list[str]]:
    """Paragraph by paragraph the commands of a file, each as one line, with $SEED in them."""
    text = re.sub(r"\s*\\\n\s*", " ", file.read_text())
    paragraphs = [
        [line for line in paragraph.splitlines() if line and not line.startswith("#")]
        for paragraph in text.split("\n\n")
    ]
    return [paragraph for paragraph in paragraphs if paragraph]


def with_seed(command: str, seed: int) -> str:
    """The command for one seed."""
    return command.replace("$SEED", str(seed))


def add_result(path: Path, key: str, value) -> None:
    """Put `value` under `key` into a JSON file of results, beside what is there."""
    results = json.loads(path.read_text()) if path.exists() else {}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results | {key: value}, indent=2) + "\n")
    partial.replace(path)


def values_of(command: str) -> dict[str, str]:
    """What follows each flag, the first word of it."""
    words = shlex.split(command)
    return {word: after for word, after in zip(words, words[1:]) if word.startswith("--")}


def folder_of(command: str) -> Path:
    """The folder of the command's run."""
    values = values_of(command)
    folder = values.get("--output-dir") or values.get("--resume")
    if folder is None:
        raise SystemExit(f"this command has no --output-dir, in which to write its end: {command}")
    return ROOT / folder


def read_wall_time(folder: Path) -> dict:
    """What is known of the commands that ran in a folder: their seconds, and which are finished."""
    path = folder / "wall_time.json"
    return json.loads(path.read_text()) if path.exists() else {"seconds": 0.0, "finished": []}


def reached_its_end(folder: Path) -> bool:
    """Whether a run has all of its iterations: one that is stopped by SIGTERM ends well, too.

    A folder of something else has.
    """
    args, metrics = folder / "args.json", folder / "metrics.jsonl"
    if not (args.exists() and metrics.exists()):
        return True
    iterations = [json.loads(line)["iteration"] for line in metrics.read_text().splitlines()]
    return bool(iterations) and iterations[-1] + 1 >= json.loads(args.read_text())["num_iterations"]


def with_paths(command: str) -> str:
    """The command with the paths that its patterns stand for, but for runs short of their end.

    A pattern of none but such runs is quoted, and names no file: the command will refuse it.
    """

    def paths(pattern: re.Match) -> str:
        found = sorted(glob.glob(pattern[0], root_dir=ROOT))
        finished = [path for path in found if reached_its_end(ROOT / path)]
        return " ".join(finished) or (shlex.quote(pattern[0]) if found else pattern[0])

    return re.sub(r"\S*\*\S*", paths, command)


def is_finished(command: str) -> bool:
    """Whether exactly this command, with its seed and the paths of today, has ended well."""
    return with_paths(command) in read_wall_time(folder_of(command))["finished"]


def resumed(command: str) -> str:
    """The command with --resume where its run has a checkpoint."""
    folder = folder_of(command)
    if not any((folder / name).exists() for name in ("checkpoint", "checkpoint.old")):
        return command
    return re.sub(r"--output-dir (\S+)", r"--output-dir \1 --resume \1", command)


def run_command(command: str, jobs: int) -> bool:
    """Run a command that is not finished; whether it is afterwards."""
    if is_finished(command):
        return True
    command = with_paths(command)
    command_now = resumed(command)
    print(f"$ {command_now}", flush=True)
    env = os.environ | {
        "OMP_NUM_THREADS": str(max(1, CORES // jobs)),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # its python
    }
    start, load = time.time(), os.getloadavg()[0]
    done = subprocess.run(["bash", "-c", command_now], cwd=ROOT, env=env).returncode == 0
    # Read after the command: it may have begun by emptying its folder.
    folder = folder_of(command)
    done = done and reached_its_end(folder)
    before = read_wall_time(folder)
    wall_time = {
        "seconds": before["seconds"] + time.time() - start,
        "jobs_side_by_side": jobs,
        "cores": CORES,
        "load_before": load,
        "finished": before["finished"] + [command] * done,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "wall_time.json").write_text(json.dumps(wall_time, indent=2) + "\n")
    return done


def run_job(commands: tuple[str, ...], jobs: int) -> str | None:
    """Run commands one after the other; the first that fails ends the job, and is returned."""
    return next((command for command in commands if not run_command(command, jobs)), None)


def main(args: Args) -> None:
    paragraphs = read_commands(args.file)
    jobs = [
        tuple(with_seed(command, seed) for command in paragraph)
        for seed in args.seeds
        for paragraph in paragraphs
    ]
    jobs = list(dict.fromkeys(jobs))  # one without $SEED is the same for all seeds
    for command in itertools.chain(*jobs):
        folder_of(command)  # what has none is refused before anything runs
    with ThreadPoolExecutor(args.jobs) as pool:
        failed = [*filter(None, pool.map(lambda job: run_job(job, args.jobs), jobs))]
    if failed:
        raise SystemExit("\n".join(["failed:", *failed]))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
