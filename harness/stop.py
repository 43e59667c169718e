"""How a command ends before its end: wrong input, a fault, a signal, no finite gradient."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from tqdm import tqdm

ALONE_AFTER = 10.0
"""Seconds in which torchrun has ended a rank, where the node's first one has failed."""
HUNG = "hung reward"
"""Name of a thread that never ends."""


class Ended(SystemExit):
    """An end that this project has chosen; any other SystemExit is a fault of what it called."""


def fail(message: str) -> NoReturn:
    """One line on stderr and exit code 2: the fault and the remedy.

    Of the ranks of a node the first one says it, and torchrun ends the others; one that fails
    alone says it when they have not been ended for a while.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0)) if "WORLD_SIZE" in os.environ else 0
    of_rank = ""
    if local_rank > 0:
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(ALONE_AFTER)
        of_rank = f"rank {os.environ.get('RANK')}: "
    print(f"{Path(sys.argv[0]).name}: error: {of_rank}{one_line(message)}", file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()  # else gloo's threads may outlive the interpreter
    raise Ended(2)


def require(condition: bool, message: str) -> None:
    """`fail` with the message, unless the condition holds."""
    if not condition:
        fail(message)


def one_line(message: str, longest: int = 700) -> str:
    """A message without line breaks, and without the middle of what is long in it."""
    line = " ".join(message.split())
    if len(line) <= longest:
        return line
    return f"{line[: longest // 2]} ... {line[-longest // 2 :]}"


def join_ranks(device: torch.device) -> None:
    """dist.init_process_group, on a store of its own for each start by torchrun --max-restarts.

    torchrun keeps its store over restarts: a rank would find the addresses of dead ranks there. A
    rank may wait long for another, for its download or a slow reward; torchrun ends those that wait
    for a dead one.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, _, _ = next(dist.rendezvous("env://", rank, world_size))
    store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    ranks = {"store": store, "rank": rank, "world_size": world_size}
    dist.init_process_group(backend, timeout=timedelta(days=7), **ranks)


def end_run(message: str) -> NoReturn:
    """One line on stderr and exit code 1 on every rank, all of which call this."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(
            f"error: {one_line(message)}", file=sys.stderr
        )  # on a line of its own, not the bar's
    if dist.is_initialized():
        # torchrun ends the other ranks when one has ended: rank 0 must have said everything.
        dist.barrier()
    if any(thread.name == HUNG for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the interpreter would wait for what the thread has begun
    if dist.is_initialized():
        dist.destroy_process_group()  # else gloo's threads may outlive the interpreter
    raise Ended(1)


def end_alone(message: str) -> NoReturn:
    """The same on this rank, while the others wait for it in a collective: torchrun ends them."""
    of_rank = f"rank {os.environ.get('RANK', 0)}: " if dist.is_initialized() else ""
    tqdm.write(f"error: {of_rank}{one_line(message)}", file=sys.stderr)
    if dist.is_initialized():
        sys.stderr.flush()
        os._exit(1)  # leaving the process group would wait for the others
    raise Ended(1)


def catch_signals(has_begun: Callable[[], bool]) -> list[int]:
    """From now on SIGTERM and SIGINT are added to the list that this returns.

    The run looks at it where it can stop without loss. A second SIGINT ends the process at once,
    and so does the first one where nothing has begun that could be lost.
    """
    received, times = [], []
    is_first_rank = int(os.environ.get("RANK", 0)) == 0

    def say(line: str):
        if is_first_rank:
            os.write(2, f"\n{line}\n".encode())  # print may be what the signal has interrupted

    def handle(number, frame):
        if number == signal.SIGINT and not has_begun():
            say("interrupted")
            os._exit(130)
        # Within a second it is the same Ctrl-C: the terminal sends it to every process, and
        # torchrun hands it on.
        if number == signal.SIGINT and number in received and time.monotonic() - times[0] > 1:
            os._exit(130)
        if number == signal.SIGINT and number not in received:
            say("stopping where nothing is lost; Ctrl-C again ends at once")
        received.append(number)
        times.append(time.monotonic())

    def restore():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
    os.register_at_fork(after_in_child=restore)  # a reward's processes end when told to
    return received


def end_early(run_dir: Path, signals: list[int] | None) -> NoReturn:
    """End a run that has saved all it has, on every rank, with one line on stderr.

    `signals` are those of this rank, where one of the ranks has got one: exit code 130 after
    SIGINT, else 0, as schedulers want it that start a stopped job again. None stands for too many
    skipped updates: exit code 1.
    """
    if signals is None:
        reason = "the last updates had no finite gradient and were skipped"
        remedy = "lower --learning-rate or use --dtype fp32"
        end_run(f"{reason}; {remedy}; the run so far is in {run_dir}")
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(f"stopped, and saved; resume it with --resume {run_dir}", file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()
    # A rank's code other than 0 is a failure to torchrun, which may start the run again.
    raise Ended(130 if signal.SIGINT in signals and "TORCHELASTIC_RUN_ID" not in os.environ else 0)
