"""What the claims of benchmarks/verdicts.py assert, from the figures of runs.

Each function takes the seeds of the runs and gives parts, or figures to be seen beside them.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks import comparison
from benchmarks.claim_runs import (
    GAMMAS,
    METHODS,
    REWARD,
    REWARDS,
    SINGLE,
    STOPS,
    TASKS,
    drawn,
    evaluated,
    figure,
    in_standard_deviations,
    mean_figure,
    share_with,
    slug,
    stored,
    training_rewards,
)
from benchmarks.report import at_equal_reward
from benchmarks.zoo_eval import ROOT


@dataclass(frozen=True)
class Part:
    """Something that a claim asserts: that `differences` are above 0, each of a prompt and seed.

    Prompt after prompt, with all seeds of each. Where `bounded` it asserts that they are not above
    0.
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

    def other_errors(self, seeds: int) -> dict[str, float]:
        """Standard errors of the mean over other seeds of the same prompts, and over other prompts.

        `standard_error` takes the pairs for independent, as if each seed had had prompts of its
        own.
        """
        by_prompt, errors = np.reshape(self.differences, (-1, seeds)), {}
        if seeds > 1:
            within = by_prompt.var(axis=1, ddof=1).mean() / by_prompt.size
            errors["other seeds"] = float(within**0.5)
        if len(by_prompt) > 1:
            of_means = by_prompt.mean(axis=1).std(ddof=1) / len(by_prompt) ** 0.5
            errors["other prompts"] = float(of_means)
        return errors

    def verdict_at(self, error: float) -> str:
        """The verdict, `error` being the mean's standard error."""
        above = self.mean > 2 * error
        if self.bounded:
            return "does not hold" if above else "holds"
        if above:
            return "holds"
        return "does not hold" if self.mean < -2 * error else "cannot be told"

    @property
    def verdict(self) -> str:
        return self.verdict_at(self.standard_error)

    def __str__(self) -> str:
        return f"{self.what} {self.mean:+.3g} ± {self.standard_error:.2g}: {self.verdict}"


@dataclass(frozen=True)
class InAllSeeds(Part):
    """Something that is asserted of every seed."""

    def verdict_at(self, error: float) -> str:
        return "holds" if min(self.differences) > 0 else "does not hold"


def verdict_of(parts: Sequence[Part]) -> str:
    """Of a claim: it holds if all of its parts do."""
    return verdict_of_all([part.verdict for part in parts])


def other_verdicts(parts: Sequence[Part], seeds: int) -> dict[str, str]:
    """Those of a claim by `Part.other_errors`, where they differ from its verdict."""
    verdicts = {}
    for kind in ("other seeds", "other prompts"):
        errors = [part.other_errors(seeds).get(kind, part.standard_error) for part in parts]
        verdicts[kind] = verdict_of_all([p.verdict_at(e) for p, e in zip(parts, errors)])
    return {kind: verdict for kind, verdict in verdicts.items() if verdict != verdict_of(parts)}


def verdict_of_all(verdicts: Sequence[str]) -> str:
    """The worst of the parts' verdicts."""
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
        own, other = distances[run(first)], distances[run(second)]
        return None if own is None else own - other

    return of_single(value, seeds)


def dpok_beats_sft(seeds, sft: str) -> list[Part]:
    """`sft` is the name of its runs."""
    pairs = {"DPOK - SFT": ("dpok", sft), "DPOK - base": ("dpok", "base")}
    pairs["SFT - base"] = sft, "base"
    return [Part(f"reward, {name}", single("reward", *pair, seeds)) for name, pair in pairs.items()]


def costs(name: str, sft: str, differences: Callable[[str, str], list[float]]) -> list[Part]:
    """What SFT and DPOK add to a distance of this name."""
    return [
        Part(f"{name}, SFT - base", differences(sft, "base")),
        Part(f"{name}, SFT - DPOK", differences(sft, "dpok")),
        Part(f"{name}, DPOK - base", differences("dpok", "base"), bounded=True),
    ]


def sft_costs_quality(seeds) -> list[Part]:
    """Of SFT without KL, in all pictures and in right ones."""
    return [
        *costs("distance", "sft", lambda *pair: single("distance", *pair, seeds)),
        *costs("distance of right pictures", "sft", lambda *pair: single_right(*pair, seeds)),
    ]


def kl_o_costs_quality(seeds) -> list[Part]:
    return costs("distance", "sft-kl-o", lambda *pair: single("distance", *pair, seeds))


def kl_keeps_quality(seeds) -> list[Part]:
    gain = np.array(single("reward", "dpok-without-kl", "base", seeds))
    loss = np.array(single("reward", "dpok-without-kl", "dpok", seeds))
    distance = single("distance", "dpok-without-kl", "dpok", seeds)
    return [
        Part("distance, without the KL - with", distance),
        Part("a tenth of the gain - the reward that the KL costs", gain / 10 - loss),
    ]


def kl_of_runs(seeds) -> dict[str, list[float]]:
    """KL to the pretrained model in nats, prompt by prompt and seed by seed."""
    return {
        method: of_single(lambda name, prompt, run: figure(name, run(method), "kl", prompt), seeds)
        for method in ("dpok", "dpok-without-kl")
    }


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
        parts.append(Part(f"{key}, KL-D - KL-O, at {GAMMAS[-1]} less at {GAMMAS[0]}", growth))
    return parts


def bias_goes(seeds) -> list[Part]:
    success = lambda model: figure("roses", model, "success", "Four roses")
    differences = [success(f"dpok__{seed}") - success("base") for seed in seeds]
    return [Part('success on "Four roses", DPOK - base', differences)]


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
    return {model: share_with("bottle", drawn("roses", model)["Four roses"]) for model in models}


def by_prompt(key: str, name: str, first: str, second: str, seeds) -> np.ndarray:
    """Differences of a figure between two models over the prompts of an evaluation, and seeds.

    A model has {seed} in its name, or is the base.
    """
    return np.array(
        [
            figure(name, first.format(seed=seed), key, prompt)
            - figure(name, second.format(seed=seed), key, prompt)
            for prompt in evaluated(name)["base"]
            for seed in seeds
        ]
    )


def value_function_helps(seeds) -> list[Part]:
    training = lambda method, seed: np.mean(training_rewards(f"many/{method}__{seed}"))
    without = "dpok-without-value"
    while_training = [training("dpok", seed) - training(without, seed) for seed in seeds]
    return [
        Part("reward, with - without", single("reward", "dpok", without, seeds)),
        Part(
            "reward on many prompts, with - without",
            by_prompt("reward", "many", "dpok__{seed}", without + "__{seed}", seeds),
        ),
        Part("mean training reward on many prompts, with - without", while_training),
    ]


def many_prompts_at_equal_quality(seeds) -> list[Part]:
    base = [
        figure("many", "base", "distance", prompt)
        for prompt in evaluated("many")["base"]
        for _ in seeds
    ]
    cost = by_prompt("distance", "many", "dpok__{seed}", "base", seeds)
    return [
        Part("reward, DPOK - base", by_prompt("reward", "many", "dpok__{seed}", "base", seeds)),
        Part("what DPOK adds to the distance - a tenth", cost - np.array(base) / 10, bounded=True),
    ]


def unseen_prompts_gain(seeds) -> list[Part]:
    parts = []
    for key in ("reward", "success"):
        of_kind = [
            figure(name, f"dpok__{slug(prompt)}__{seed}", key, unseen)
            - figure(name, "base", key, unseen)
            for prompt, unseen in SINGLE.items()
            for name in [f"unseen__{slug(prompt)}"]
            for seed in seeds
        ]
        parts.append(Part(f"{key} on the unseen prompt of the kind, trained - base", of_kind))
        after_many = by_prompt(key, "many_unseen", "dpok__{seed}", "base", seeds)
        parts.append(Part(f"{key} on unseen prompts after many, trained - base", after_many))
    return parts


def ddpo_beats_rwr(seeds, rewards: Sequence[str]) -> list[Part]:
    """On some of `REWARDS`."""
    parts = []
    for reward in rewards:
        spec = REWARDS[reward]
        final = {
            method: np.stack(
                [
                    in_standard_deviations("queries", f"{method}__{reward}__{seed}", spec)
                    for seed in seeds
                ],
                axis=1,
            ).flatten()
            for method in METHODS
        }
        behind = final["ddpo-sf"] - final["ddpo-is"]
        parts.append(Part(f"{reward}, SF - IS", behind, bounded=True))
        for first, second in itertools.product(("ddpo-is", "ddpo-sf"), ("rwr", "rwr-sparse")):
            what = f"{reward}, {METHODS[first]} - {METHODS[second]}"
            parts.append(Part(what, final[first] - final[second]))
    return parts


def rewards_by_method(seeds) -> dict[str, dict[str, list[float]]]:
    """By reward the mean over the prompts, of the base and of each method seed by seed.

    And the distance to real renders of those that were trained on image reward.
    """

    def means(reward: str, key: str) -> dict[str, list[float]]:
        of_methods = {
            method: [mean_figure("queries", f"{method}__{reward}__{seed}", key) for seed in seeds]
            for method in METHODS
        }
        return {"base": [mean_figure("queries", "base", key)]} | of_methods

    found = {reward: means(reward, spec) for reward, spec in REWARDS.items()}
    return found | {"distance after image-reward": means("image-reward", "distance")}


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


def on_the_way(run: str, seed: int, key: str) -> list[float]:
    """A mean figure of the base, and of a run of claim 11 at each of its stops."""
    stops = [f"{run}__{seed}__after_{stop}" for stop in STOPS[run]]
    return [mean_figure("over", model, key) for model in ("base", *stops)]


def ends_in_noise(seeds) -> list[Part]:
    name, run = "over_incompressibility", "ddpo-incompressibility"
    empty = [
        figure(name, f"{run}__{seed}__after_180", "empty", prompt)
        for prompt in evaluated(name)["base"]
        for seed in seeds
    ]
    return [Part("share without a thing - 1/2", np.array(empty) - 0.5)]


def judge_falls(seeds) -> list[Part]:
    stops = ["ddpo-image-reward__{seed}__after_180", "ddpo-image-reward__{seed}__after_45"]
    reward, success = (by_prompt(key, "over", *stops, seeds) for key in ("reward", "success"))
    return [
        Part("reward, after 180 iterations - after 45", reward),
        Part("success, after 45 iterations - after 180", -success),
    ]


def kl_delays(seeds) -> list[Part]:
    """Of DPOK without the KL and with it where both reach the highest reward that both have."""

    def at_equal(key: str) -> np.ndarray:
        """Of each seed that of the run with the KL less that of the run without."""
        way = lambda run, seed: [on_the_way(run, seed, of) for of in ("reward", key)]
        runs = ("dpok-with-kl", "dpok-without-kl")
        figures = [at_equal_reward([way(run, seed) for run in runs])[1] for seed in seeds]
        return np.array([with_kl - without_kl for with_kl, without_kl in figures])

    return [
        Part("success at equal reward, with the KL - without", at_equal("success")),
        Part("distance at equal reward, without the KL - with", -at_equal("distance")),
    ]


def pretraining_loss_delays(seeds) -> list[Part]:
    """From the runs of docs/large_scale_ppo.md."""
    path = ROOT / "benchmarks/results/large_scale_ppo.json"
    distance = json.loads(path.read_text())["at_equal_reward"]
    pretraining = [distance["preference without the pre-training loss"], distance["preference"]]
    differences = np.subtract(*pretraining)[list(seeds)]
    return [Part("distance at equal reward, without the loss - with", differences)]


def gains(name: str, run: str, spec: str, seeds) -> np.ndarray:
    """Of the runs of a name over the base, by prompt and seed."""
    return by_prompt(spec, name, run + "__{seed}", "base", seeds)


def joint_run_keeps_gains(seeds) -> list[Part]:
    parts = []
    for task, spec in TASKS.items():
        joint, alone = (gains(f"joint_{task}", run, spec, seeds) for run in ("joint", task))
        parts.append(
            Part(f"{task}, gain of the joint run - 0.8 of the single run's", joint - 0.8 * alone)
        )
    return parts


def single_runs_pay(seeds) -> list[Part]:
    """The two losses that the paper names."""
    return [
        Part(
            f"{other}, base - trained for {task} alone",
            -gains(f"joint_{other}", task, TASKS[other], seeds),
        )
        for task, other in (("preference", "portraits"), ("portraits", "preference"))
    ]


def mean_gain(name: str, task: str, run: str, seeds) -> list[float]:
    """Over prompts and seeds, with its standard error."""
    part = Part("", gains(name, run, TASKS[task], seeds))
    return [part.mean, part.standard_error]


def gains_by_task(seeds) -> dict[str, dict[str, list[float]]]:
    """Of the joint run and of every single run on held-out prompts, by the task that is judged."""
    return {
        task: {run: mean_gain(f"joint_{task}", task, run, seeds) for run in ("joint", *TASKS)}
        for task in TASKS
    }


def held_out_prompts_gain(seeds) -> list[Part]:
    return [
        Part(
            f"{task} on held-out prompts, trained - base",
            gains(f"joint_{task}", task, TASKS[task], seeds),
        )
        for task in ("composition", "portraits")
    ]


def gains_on_training_prompts(seeds) -> dict[str, list[float]]:
    """Of the same runs."""
    tasks = ("composition", "portraits")
    return {task: mean_gain(f"trained_{task}", task, task, seeds) for task in tasks}


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
