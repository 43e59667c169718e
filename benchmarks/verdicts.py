"""What the papers claim, and whether it holds on the zoo: the table of docs/claims.md.

python -m benchmarks.run benchmarks/claims/FILE.sh --seeds 0 1 2 --jobs 2
python -m benchmarks.run benchmarks/claims/evaluate.sh --jobs 2
python -m benchmarks.verdicts --claims 1 2 3        benchmarks/results/claims.json, docs/claims.md
                                                    and its pictures

benchmarks/claims/README.md has the settings of the runs and the rule of the verdicts, which were
fixed before them. What runs/ has is first added to benchmarks/results/claims_figures.json, from
which claims are judged. One whose runs are not there stays as it is in the results, as does a
picture whose parts were drawn elsewhere.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import tyro

from benchmarks import comparison
from benchmarks.claim_pictures import PICTURES
from benchmarks.claim_runs import (
    GAMMAS,
    METHODS,
    REWARD,
    REWARDS,
    SINGLE,
    NotHereError,
    collect,
    core_hours,
    evaluated,
    figure,
    in_standard_deviations,
    share_with,
    slug,
    stored,
    training_rewards,
)
from benchmarks.pages import fill, markdown_table
from benchmarks.report import save_results
from benchmarks.zoo_eval import ROOT, weights_digest


@dataclass(frozen=True)
class Part:
    """Something that a claim asserts: that `differences` are above 0, each of a prompt and seed.

    Where `bounded` it asserts that they are not above 0.
    """

    what: str
    differences: Sequence[float]
    bounded: bool = False

    @property
    def mean(self) -> float:
        return float(np.mean(self.differences))

    @property
    def standard_error(self) -> float:
        return float(np.std(self.differences, ddof=1) / len(self.differences) ** 0.5)

    @property
    def verdict(self) -> str:
        above = self.mean > 2 * self.standard_error
        if self.bounded:
            return "does not hold" if above else "holds"
        if above:
            return "holds"
        below = self.mean < -2 * self.standard_error
        return "does not hold" if below else "cannot be told"

    def __str__(self) -> str:
        return f"{self.what} {self.mean:+.3g} ± {self.standard_error:.2g}: {self.verdict}"


@dataclass(frozen=True)
class InAllSeeds(Part):
    """Something that is asserted of every seed."""

    @property
    def verdict(self) -> str:
        return "holds" if min(self.differences) > 0 else "does not hold"


def verdict_of(parts: Sequence[Part]) -> str:
    """Of a claim: it holds if all of its parts do."""
    verdicts = {part.verdict for part in parts}
    for word in ("does not hold", "cannot be told"):
        if word in verdicts:
            return word
    return "holds"


def of_single(value: Callable[[str, str, Callable], float | None], seeds) -> list[float]:
    """`value` of each of the four prompts and each seed, as far as there is one.

    It is given the evaluation, the prompt and a function from a method to its run.
    """
    values = []
    for prompt in SINGLE:
        for seed in seeds:
            run = lambda method: f"{method}__{slug(prompt)}__{seed}" if method != "base" else "base"
            values.append(value(f"single__{slug(prompt)}", prompt, run))
    return [value for value in values if value is not None]


def single(key: str, first: str, second: str, seeds) -> list[float]:
    """Differences of a figure between two methods on the four prompts."""
    return of_single(
        lambda name, prompt, run: (
            figure(name, run(first), key, prompt) - figure(name, run(second), key, prompt)
        ),
        seeds,
    )


def single_right(first: str, second: str, seeds) -> list[float]:
    """Differences of the distance of right pictures alone."""

    def value(name, prompt, run):
        distances = stored()["right_distances"][name]
        return distances and distances[run(first)] - distances[run(second)]

    return of_single(value, seeds)


def dpok_beats_sft(seeds) -> list[Part]:
    pairs = {"DPOK - SFT": ("dpok", "sft"), "DPOK - base": ("dpok", "base")}
    pairs["SFT - base"] = "sft", "base"
    return [Part(f"reward, {name}", single("reward", *pair, seeds)) for name, pair in pairs.items()]


def sft_costs_quality(seeds) -> list[Part]:
    parts = []
    for name, differences in (
        ("distance", lambda *pair: single("distance", *pair, seeds)),
        ("distance of right pictures", lambda *pair: single_right(*pair, seeds)),
    ):
        parts += [
            Part(f"{name}, SFT - base", differences("sft", "base")),
            Part(f"{name}, SFT - DPOK", differences("sft", "dpok")),
            Part(f"{name}, DPOK - base", differences("dpok", "base"), bounded=True),
        ]
    return parts


def kl_keeps_quality(seeds) -> list[Part]:
    gain = np.array(single("reward", "dpok-without-kl", "base", seeds))
    loss = np.array(single("reward", "dpok-without-kl", "dpok", seeds))
    distance = single("distance", "dpok-without-kl", "dpok", seeds)
    return [
        Part("distance, without the KL - with", distance),
        Part("a tenth of the gain - the reward that the KL costs", gain / 10 - loss),
    ]


def kl_o_repairs_more(seeds) -> list[Part]:
    prompt, parts = "A green colored rabbit", []
    for key in ("distance", "reward"):
        differences = {
            gamma: [
                figure("gamma", f"kl-d-{gamma}__{seed}", key, prompt)
                - figure("gamma", f"kl-o-{gamma}__{seed}", key, prompt)
                for seed in seeds
            ]
            for gamma in GAMMAS
        }
        parts += [
            Part(f"{key}, KL-D - KL-O at {gamma}", found) for gamma, found in differences.items()
        ]
        growth = np.subtract(differences[GAMMAS[-1]], differences[GAMMAS[0]])
        parts.append(Part(f"{key}, the same at {GAMMAS[-1]} less at {GAMMAS[0]}", growth))
    return parts


def bias_goes(seeds) -> list[Part]:
    success = lambda model: figure("roses", model, "success", "Four roses")
    gains = [success(f"dpok__{seed}") - success("base") for seed in seeds]
    return [Part('success on "Four roses", DPOK - base', gains)]


def many_by_prompt(seeds) -> dict[str, list[float]]:
    """Success and distance on each prompt: the base's, and the mean over DPOK's runs."""
    means = {}
    for prompt in evaluated("many")["base"]:
        for key in ("success", "distance"):
            of_runs = [figure("many", f"dpok__{seed}", key, prompt) for seed in seeds]
            base = figure("many", "base", key, prompt)
            means[f"{prompt}, {key}"] = [base, float(np.mean(of_runs))]
    return means


def bottles(seeds) -> dict[str, float]:
    """Share of the pictures of "Four roses" that show the bottle of that name, by model."""
    models = ["base", *(f"dpok__{seed}" for seed in seeds)]
    return {model: share_with("bottle", "roses", model, "Four roses") for model in models}


def many(key: str, name: str, first: str, second: str, seeds) -> list[float]:
    """Differences of a figure between two methods over the prompts of an evaluation, and seeds."""
    run = lambda method, seed: "base" if method == "base" else f"{method}__{seed}"
    return [
        figure(name, run(first, seed), key, prompt) - figure(name, run(second, seed), key, prompt)
        for prompt in evaluated(name)["base"]
        for seed in seeds
    ]


def value_function_helps(seeds) -> list[Part]:
    training = lambda method, seed: np.mean(training_rewards(f"many/{method}__{seed}"))
    without = "dpok-without-value"
    while_training = [training("dpok", seed) - training(without, seed) for seed in seeds]
    return [
        Part("reward, with - without", single("reward", "dpok", without, seeds)),
        Part(
            "reward on many prompts, with - without",
            many("reward", "many", "dpok", without, seeds),
        ),
        Part("mean training reward on many prompts, with - without", while_training),
    ]


def many_prompts_at_equal_quality(seeds) -> list[Part]:
    base = [
        figure("many", "base", "distance", prompt)
        for prompt in evaluated("many")["base"]
        for _ in seeds
    ]
    cost = many("distance", "many", "dpok", "base", seeds)
    return [
        Part("reward, DPOK - base", many("reward", "many", "dpok", "base", seeds)),
        Part("a tenth of the base's distance - what DPOK adds", np.array(base) / 10 - cost),
    ]


def unseen_prompts_gain(seeds) -> list[Part]:
    parts = []
    for key in ("reward", "success"):
        gains = [
            figure(name, f"dpok__{slug(prompt)}__{seed}", key, unseen)
            - figure(name, "base", key, unseen)
            for prompt, unseen in SINGLE.items()
            for name in [f"unseen__{slug(prompt)}"]
            for seed in seeds
        ]
        parts.append(Part(f"{key} on the unseen prompt of the kind, trained - base", gains))
        gains = many(key, "many_unseen", "dpok", "base", seeds)
        parts.append(Part(f"{key} on unseen prompts after many, trained - base", gains))
    return parts


def ddpo_beats_rwr(seeds) -> list[Part]:
    parts = []
    for reward, spec in REWARDS.items():
        final = {
            method: np.array(
                [
                    in_standard_deviations("queries", f"{method}__{reward}__{seed}", spec)
                    for seed in seeds
                ]
            )
            for method in METHODS
        }
        behind = final["ddpo-sf"] - final["ddpo-is"]
        parts.append(Part(f"{reward}, SF - IS", behind, bounded=True))
        for first, second in itertools.product(("ddpo-is", "ddpo-sf"), ("rwr", "rwr-sparse")):
            what = f"{reward}, {METHODS[first]} - {METHODS[second]}"
            parts.append(Part(what, final[first] - final[second]))
    return parts


def rewards_by_round(seeds) -> dict[str, list[list[float]]]:
    """Of each seed's runs with guidance in training and without, before the first round and on.

    The samples that a round begins with are those of the policy after the round before.
    """
    return {
        method: [training_rewards(f"cfg/{method}__{seed}").tolist() for seed in seeds]
        for method in ("without", "with")
    }


def falls_apart_without_guidance(seeds) -> list[Part]:
    after = {method: np.array(rewards) for method, rewards in rewards_by_round(seeds).items()}
    return [
        InAllSeeds(
            "reward without guidance in training, after round 1 - after 3",
            after["without"][:, 1] - after["without"][:, 3],
        ),
        InAllSeeds(
            "reward with it, after round 3 - after 1", after["with"][:, 3] - after["with"][:, 1]
        ),
    ]


def ranking_of_methods(seeds) -> list[Part]:
    """From docs/comparison.md's runs at equal training time, figure by figure for each seed."""
    path = ROOT / "benchmarks/results/comparison.json"
    of_methods = json.loads(path.read_text())["equal_time"]

    def less(column: str, first: str, second: str) -> np.ndarray:
        values = [[run[column] for run in of_methods[m]["runs"]] for m in (first, second)]
        return np.subtract(*values)[list(seeds)]

    parts = []
    for what, column, best in (
        ("reward", REWARD, "refl"),
        ("share of the right colour", "benchmarks/zoo_rewards.py:colours", "large_scale_ppo"),
    ):
        for method, label in comparison.METHODS.items():
            if method != best:
                differences = less(column, best, method)
                parts.append(Part(f"{what}, {comparison.METHODS[best]} - {label}", differences))
    return parts


@dataclass(frozen=True)
class Claim:
    text: str
    place: str
    """In the papers."""
    parts: Callable[[Sequence[int]], list[Part]] | None
    """What it asserts, from the runs of some seeds; None where nothing can be run."""
    why: str = ""
    """Then."""
    seen: Callable[[Sequence[int]], dict] | None = None
    """Figures beside it, which decide nothing."""


CLAIMS = {
    "1": Claim("DPOK beats SFT, both beat the base", "DPOK Fig. 3a", dpok_beats_sft),
    "2": Claim("SFT costs quality where DPOK does not", "DPOK Fig. 3b", sft_costs_quality),
    "3": Claim(
        "with the KL DPOK has the quality, at about the reward, of DPOK without",
        "DPOK 5.3, Fig. 4",
        kl_keeps_quality,
    ),
    "4": Claim(
        "KL-O repairs SFT more than KL-D and costs reward, as gamma grows",
        "DPOK Fig. 8, 9",
        kl_o_repairs_more,
    ),
    "5": Claim('"Four roses": the bias goes', "DPOK 5.4, Fig. 5", bias_goes, seen=bottles),
    "6": Claim(
        "the value function raises the final reward and speeds up many prompts",
        "DPOK A.5, Fig. 6, 7",
        value_function_helps,
    ),
    "7": Claim(
        "many prompts: reward up at equal quality",
        "DPOK Table 1",
        many_prompts_at_equal_quality,
        seen=many_by_prompt,
    ),
    "8": Claim("unseen prompts gain too", "DPOK Fig. 10, DDPO Fig. 6", unseen_prompts_gain),
    "9": Claim(
        "DDPO-IS at least DDPO-SF, both above RWR and sparse RWR, at equal queries",
        "DDPO Fig. 4",
        ddpo_beats_rwr,
    ),
    "10": Claim(
        "without CFG in training sparse RWR falls apart after its first round",
        "DDPO B.1, Fig. 8",
        falls_apart_without_guidance,
        seen=rewards_by_round,
    ),
    "12": Claim(
        '"n animals": a reward that can be fooled about counts is answered in writing',
        "DDPO Fig. 7",
        None,
        "a picture of 64 pixels has no writing, and no reward of the zoo reads",
    ),
    "15": Claim(
        "ReFL has the highest reward, PPO is best on what was not trained on",
        "Zhang Tables 1, 2; [docs/comparison.md](comparison.md)",
        ranking_of_methods,
    ),
}
"""By the number of the claim in benchmarks/claims/README.md."""


@dataclass
class Args:
    claims: tuple[str, ...] = tuple(CLAIMS)
    """Those to judge anew."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the runs."""


def main(args: Args) -> None:
    path = ROOT / "benchmarks/results/claims.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results["weights"] = weights_digest()
    collect()
    for number in args.claims:
        claim = CLAIMS[number]
        if claim.parts is None:
            continue
        parts = claim.parts(args.seeds)
        result = results.setdefault(number, {})
        result |= {"verdict": verdict_of(parts), "seeds": args.seeds}
        result["parts"] = {
            part.what: {
                "differences": [*map(float, part.differences)],
                "mean": part.mean,
                "standard_error": part.standard_error,
                "verdict": part.verdict,
            }
            for part in parts
        }
        print(number, verdict_of(parts), *map(str, parts), sep="\n    ")
        try:
            if claim.seen:
                result["seen"] = claim.seen(args.seeds)
            if number in PICTURES:
                picture = ROOT / f"docs/images/claim_{number}.png"
                PICTURES[number](args.seeds).savefig(picture, dpi=100)
        except NotHereError as error:
            print(f"its picture stays as it is: {error}")
    results["core_hours"] = results.get("core_hours", {}) | core_hours()
    save_results("claims", results)
    hours = sum(results["core_hours"].values())
    parts = {"verdicts": markdown_of(results), "core-hours": f"{hours:.1f} core-hours\n"}
    fill(ROOT / "docs/claims.md", parts)


def markdown_of(results: dict) -> str:
    rows = []
    for number, claim in CLAIMS.items():
        about = f"{claim.text} ({claim.place})"
        if claim.parts is None:
            rows.append([number, about, claim.why, "**cannot be told**"])
        elif number in results:
            figures = "<br>".join(
                f"{what} {part['mean']:+.3g} ± {part['standard_error']:.2g}"
                for what, part in results[number]["parts"].items()
            )
            verdict = f"**{results[number]['verdict']}**"
            rows.append([number, about, figures, verdict])
    return markdown_table(["", "claim", "difference ± standard error", ""], rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
