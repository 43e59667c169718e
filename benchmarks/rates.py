"""The learning rates of docs/claims.md, each chosen on a seed that counts nowhere else.

python -m benchmarks.run benchmarks/claims/tuning.sh --seeds 3 --jobs 2
python -m benchmarks.rates      benchmarks/results/claims_rates.json, the table of docs/claims.md

Of a method the rate is taken whose rewards in the last tenth of training have the highest mean.
"""

import json
from pathlib import Path

import numpy as np
import tyro

from benchmarks import claim_runs
from benchmarks.pages import fill, markdown_table
from benchmarks.report import save_results
from benchmarks.zoo_eval import ROOT

SEED = 3


def last_tenth(rewards: np.ndarray) -> float:
    """The mean of the last tenth of them, at least one."""
    return float(rewards[-max(1, len(rewards) // 10) :].mean())


def tried() -> dict[str, dict[str, float]]:
    """Reward in the last tenth of training, by method and rate, of the runs that are here.

    Of runs/claims-tuning/METHOD-RATE__3. Runs of a seed that counts elsewhere are refused.
    """
    found = {}
    for folder in sorted((claim_runs.RUNS / "claims-tuning").glob("*__*")):
        method, rate, args = method_and_rate(folder)
        rewards = np.array(claim_runs.rewards_of(folder))
        if len(rewards) != args["num_iterations"]:
            raise SystemExit(f"not finished: {folder}")
        if args["seed"] != SEED:
            raise SystemExit(f"rates are chosen on seed {SEED}: remove {folder}")
        found.setdefault(method, {})[rate] = last_tenth(rewards)
    return found


def method_and_rate(folder: Path) -> tuple[str, str, dict]:
    """Of a run, with its arguments."""
    args = json.loads((folder / "args.json").read_text())
    rate = args["learning_rate"]
    method = folder.name.rpartition("__")[0].replace(f"-{short(rate)}", "")
    return method, short(rate), args


def short(rate: float) -> str:
    """As the commands have it: 2e-3."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def markdown_of(rates: dict[str, dict[str, float]]) -> str:
    rows = []
    for method, of_rates in rates.items():
        of_rates = dict(sorted(of_rates.items(), key=lambda item: float(item[0])))
        best = max(of_rates, key=of_rates.get)
        cells = [f"{rate}: {reward:+.3f}" for rate, reward in of_rates.items()]
        rows.append([method, ", ".join(cells), best])
    return markdown_table(["", "reward in the last tenth of training, by rate", "taken"], rows)


def main() -> None:
    path = ROOT / "benchmarks/results/claims_rates.json"
    rates = json.loads(path.read_text()) if path.exists() else {}
    rates |= tried()
    save_results("claims_rates", rates)
    fill(ROOT / "docs/claims.md", {"rates": markdown_of(rates)})
    print(markdown_of(rates))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
