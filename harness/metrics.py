"""The numbers of an iteration, over all micro-batches and ranks."""

import math
import sys
import time
from collections import defaultdict, deque
from contextlib import contextmanager

import torch
import torch.distributed as dist


class Metrics:
    """Sums, maxima, gradient norms and times of one iteration on this rank.

    `line` and `state_dict` are collective: every rank calls them.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.added = {"sum": {}, "max": {}, "same": {}}
        self.norms, self.seconds = defaultdict(list), defaultdict(float)

    def add(self, name: str, value, reduce: str) -> None:
        """Without waiting for the device: values are read when all are reduced.

        "same" may be a tensor (n,), of which `line` has mean and standard deviation.
        """
        value = torch.as_tensor(value, dtype=torch.float64, device=self.device).detach()
        before = self.added[reduce].get(name, torch.zeros_like(value))
        after = torch.maximum(before, value) if reduce == "max" else before + value
        self.added[reduce][name] = after

    def copy(self) -> "Metrics":
        """As it is now, whatever is added to either later."""
        other = Metrics(self.device)
        other.added = {reduce: dict(added) for reduce, added in self.added.items()}
        other.norms.update({name: list(norms) for name, norms in self.norms.items()})
        other.seconds.update(self.seconds)
        return other

    @contextmanager
    def timer(self, name: str):
        began = self.now()
        yield
        self.seconds[name] += self.now() - began

    def now(self) -> float:
        """Seconds, when a GPU has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def reduced(self, reduce: str) -> dict[str, float]:
        """Over all ranks, some of which may have had nothing to add."""
        added = {name: value for name, value in self.added[reduce].items() if value.dim() == 0}
        own = dict(zip(added, torch.stack(list(added.values())).tolist())) if added else {}
        parts = [own]
        if dist.is_initialized() and reduce != "same":
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, own)
        whole = {}
        for name, value in (item for part in parts for item in part.items()):
            before = whole.get(name, 0.0)
            whole[name] = max(before, value) if reduce == "max" else before + value
        return whole

    def distributions(self) -> dict[str, torch.Tensor]:
        """The tensors (n,), on the CPU."""
        return {name: value.cpu() for name, value in self.added["same"].items() if value.dim() > 0}

    def line(self, others: dict) -> dict[str, float]:
        """All metrics, with `others`, numbers or values (n,) as of `add`.

        grad_norm is the mean of the finite norms; the others are counted.
        """
        line = {}
        for name, value in others.items():
            if isinstance(value, torch.Tensor):
                self.add(name, value, "same")
            else:
                line[name] = value
        line |= self.reduced("sum") | self.reduced("max") | self.reduced("same")
        for name, values in self.distributions().items():
            line |= mean_and_std(name, values)
        for name in [key for key in line if key.endswith("/square")]:
            square, mean = line.pop(name), line[name.replace("/square", "/mean")]
            line[name.replace("/square", "/std")] = max(square - mean**2, 0.0) ** 0.5
        for name, norms in self.norms.items():
            if finite := [norm for norm in norms if math.isfinite(norm)]:
                line[name] = sum(finite) / len(finite)
        skipped = [norm for norm in self.norms["grad_norm"] if not math.isfinite(norm)]
        times = {f"time/{name}_s": seconds for name, seconds in self.seconds.items()}
        return line | {"updates/skipped": len(skipped)} | times

    def state_dict(self) -> dict:
        added = {reduce: self.reduced(reduce) for reduce in self.added}
        added["same"] |= self.distributions()
        return {"added": added, "norms": dict(self.norms), "seconds": dict(self.seconds)}

    def load_state_dict(self, state: dict) -> None:
        """What was saved is of all ranks: the first one takes its sums."""
        first = not dist.is_initialized() or dist.get_rank() == 0
        for reduce, added in state["added"].items():
            reduce = "same" if reduce == "own" else reduce  # a checkpoint may have either
            for name, value in added.items():
                if first or reduce == "same":
                    self.add(name, value, reduce)
        self.norms.update(state["norms"])
        self.seconds.update(state["seconds"])


def mean_and_std(name: str, values: torch.Tensor) -> dict[str, float]:
    """Two metrics of a tensor (n,)."""
    return {f"{name}/mean": values.mean().item(), f"{name}/std": values.std(correction=0).item()}


def warn_where_above(line: dict[str, float], limits: dict[str, float], args) -> None:
    """A warning for every metric of a line that is above its limit, with what there is to try."""
    remedies = {
        "--dtype fp32": args.dtype != "fp32",
        "--no-allow-tf32": args.allow_tf32 and torch.cuda.is_available(),
        "--no-compile": args.compile,
    }
    left = [remedy for remedy, applies in remedies.items() if applies]
    advice = f"try {' or '.join(left)}" if left else "no flag mends it: please report it"
    for name, limit in limits.items():
        if line.get(name, 0) > limit:
            what = f"{name} is {line[name]:.1e}, more than {limit}; {advice}"
            print(f"warning: {what}", file=sys.stderr)


def all_finite(trained: dict[object, list[torch.nn.Parameter]]) -> bool:
    """Whether all weights are finite, those of all optimizers."""
    weights = [p.detach().isfinite().all() for of_one in trained.values() for p in of_one]
    return not weights or torch.stack(weights).all().item()


def none_finite(norms: deque[float]) -> bool:
    """Whether there are as many last norms as are kept, and none of them is finite."""
    return len(norms) == norms.maxlen and not any(map(math.isfinite, norms))
