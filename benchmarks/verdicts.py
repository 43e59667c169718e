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

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tyro

from benchmarks import claim_parts as parts_of
from benchmarks.claim_parts import Part, other_verdicts, verdict_of
from benchmarks.claim_pictures import PICTURES
from benchmarks.claim_runs import METHODS, NotHereError, collect, core_hours
from benchmarks.pages import fill, markdown_table
from benchmarks.report import save_results
from benchmarks.zoo_eval import ROOT, weights_digest


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
    "1": Claim("DPOK beats SFT, both beat the base", "DPOK Fig. 3a", parts_of.dpok_beats_sft),
    "2": Claim("SFT costs quality where DPOK does not", "DPOK Fig. 3b", parts_of.sft_costs_quality),
    "3": Claim(
        "with the KL DPOK has the quality, at about the reward, of DPOK without",
        "DPOK 5.3, Fig. 4",
        parts_of.kl_keeps_quality,
    ),
    "4": Claim(
        "KL-O repairs SFT more than KL-D and costs reward, as gamma grows",
        "DPOK Fig. 8, 9",
        parts_of.kl_o_repairs_more,
    ),
    "5": Claim(
        '"Four roses": the bias goes',
        "DPOK 5.4, Fig. 5",
        parts_of.bias_goes,
        seen=parts_of.bottles,
    ),
    "6": Claim(
        "the value function raises the final reward and speeds up many prompts",
        "DPOK A.5, Fig. 6, 7",
        parts_of.value_function_helps,
    ),
    "7": Claim(
        "many prompts: reward up at equal quality",
        "DPOK Table 1",
        parts_of.many_prompts_at_equal_quality,
        seen=parts_of.many_by_prompt,
    ),
    "8": Claim(
        "unseen prompts gain too", "DPOK Fig. 10, DDPO Fig. 6", parts_of.unseen_prompts_gain
    ),
    "9": Claim(
        "DDPO-IS at least DDPO-SF, both above RWR and sparse RWR, at equal queries",
        "DDPO Fig. 4",
        parts_of.ddpo_beats_rwr,
        seen=parts_of.rewards_by_method,
    ),
    "10": Claim(
        "without CFG in training sparse RWR falls apart after its first round",
        "DDPO B.1, Fig. 8",
        parts_of.falls_apart_without_guidance,
        seen=parts_of.rewards_by_round,
    ),
    "11": Claim(
        "over-optimised the reward rises while the judge falls, incompressibility ends in noise; "
        "the KL or the pre-training loss delays it",
        "DDPO 6.4, Fig. 7; Zhang App. G",
        parts_of.over_optimised,
    ),
    "12": Claim(
        '"n animals": a reward that can be fooled about counts is answered in writing',
        "DDPO Fig. 7",
        None,
        "a picture of 64 pixels has no writing, and no reward of the zoo reads",
    ),
    "13": Claim(
        "joint training reaches 80 % of the single tasks' gains, which pay an alignment tax",
        "Zhang Table 5",
        parts_of.joint_run_keeps_gains,
        seen=parts_of.gains_by_task,
    ),
    "14": Claim(
        "parity and composition reach what was not trained on",
        "Zhang Tables 3, 4",
        parts_of.held_out_prompts_gain,
        seen=parts_of.gains_on_training_prompts,
    ),
    "15": Claim(
        "ReFL has the highest reward, PPO is best on what was not trained on",
        "Zhang Tables 1, 2; [docs/comparison.md](comparison.md)",
        parts_of.ranking_of_methods,
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
    if results.get("weights") != weights_digest():
        results = {"weights": weights_digest()}
    collect()
    for number in args.claims:
        claim = CLAIMS[number]
        if claim.parts is None:
            continue
        try:
            parts = claim.parts(args.seeds)
        except KeyError as error:
            print(f"{number} stays as it is: there is no run {error}")
            continue
        result = results.setdefault(number, {})
        result |= {"verdict": verdict_of(parts), "seeds": args.seeds}
        result["other_verdicts"] = other_verdicts(parts, len(args.seeds))
        result["parts"] = {
            part.what: {
                "differences": [*map(float, part.differences)],
                "mean": part.mean,
                "standard_error": part.standard_error,
                "other_errors": part.other_errors(len(args.seeds)),
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
    if "seen" in results.get("9", {}):
        parts["rewards by method"] = markdown_of_methods(results["9"]["seen"])
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
            for kind, other in results[number].get("other_verdicts", {}).items():
                verdict += f"<br>by {kind}: {other}"
            rows.append([number, about, figures, verdict])
    return markdown_table(["", "claim", "difference ± standard error", ""], rows)


def markdown_of_methods(seen: dict[str, dict[str, list[float]]]) -> str:
    """Claim 9's table, of what `rewards_by_method` gives."""
    rows = []
    for what, by_method in seen.items():
        form = "{:.1f}" if what.startswith("distance") else "{:+.2f}"
        rows.append([what, *(", ".join(map(form.format, values)) for values in by_method.values())])
    return markdown_table(["", "base", *METHODS.values()], rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
