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
from functools import partial

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
    "1a": Claim(
        "DPOK beats SFT without KL, both beat the base",
        "DPOK Fig. 3a, whose SFT is 1b's",
        partial(parts_of.dpok_beats_sft, sft="sft"),
    ),
    "1b": Claim(
        "DPOK beats SFT with KL-O, both beat the base",
        "DPOK Fig. 3a",
        partial(parts_of.dpok_beats_sft, sft="sft-kl-o"),
    ),
    "2a": Claim(
        "SFT without KL costs quality where DPOK does not",
        "DPOK Fig. 3b, whose SFT is 2b's",
        parts_of.sft_costs_quality,
    ),
    "2b": Claim(
        "SFT with KL-O costs quality where DPOK does not",
        "DPOK Fig. 3b",
        parts_of.kl_o_costs_quality,
    ),
    "3": Claim(
        "with the KL DPOK keeps the quality that it loses without, at about the same reward",
        "DPOK 5.3, Fig. 4",
        parts_of.kl_keeps_quality,
        seen=parts_of.kl_of_runs,
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
    "9a": Claim(
        "DDPO-IS at least DDPO-SF, both above RWR and sparse RWR, at equal queries, on JPEG sizes",
        "DDPO Fig. 4",
        partial(parts_of.ddpo_beats_rwr, rewards=("compressibility", "incompressibility")),
        seen=parts_of.rewards_by_method,
    ),
    "9b": Claim(
        "the same on image reward",
        "which the paper did not try",
        partial(parts_of.ddpo_beats_rwr, rewards=("image-reward",)),
    ),
    "10": Claim(
        "without CFG in training sparse RWR falls apart after its first round",
        "DDPO B.1, Fig. 8",
        parts_of.falls_apart_without_guidance,
        seen=parts_of.rewards_by_round,
    ),
    "11a": Claim(
        "over-optimised on incompressibility, pictures end in noise",
        "DDPO 6.4, Fig. 7",
        parts_of.ends_in_noise,
    ),
    "11b": Claim(
        "over-optimised on image reward, the reward rises while the judge falls",
        "DDPO 6.4, of learned rewards, without a figure",
        parts_of.judge_falls,
    ),
    "11c": Claim("the KL delays it", "DPOK 5.3, App. D", parts_of.kl_delays),
    "11d": Claim(
        "the pre-training loss delays it",
        "Zhang App. G; [docs/notes/large_scale_ppo.md](notes/large_scale_ppo.md)",
        parts_of.pretraining_loss_delays,
    ),
    "12": Claim(
        '"n animals": a reward that can be fooled about counts is answered in writing',
        "DDPO Fig. 7",
        None,
        "a picture of 64 pixels has no writing, and no reward of the zoo reads",
    ),
    "13a": Claim(
        "joint training reaches 80 % of the single tasks' gains",
        "Zhang Table 5, of the scores",
        parts_of.joint_run_keeps_gains,
        seen=parts_of.gains_by_task,
    ),
    "13b": Claim(
        "training for one task costs others",
        "Zhang 4.4, Table 5",
        parts_of.single_runs_pay,
    ),
    "14": Claim(
        "gains in parity and composition carry over to prompts that were not trained on",
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
"""By the number of the claim in benchmarks/claims/README.md, with a letter where it has parts."""


def number_of(key: str) -> str:
    """Of a claim, without the letter of its part."""
    return key.rstrip("abcd")


@dataclass
class Args:
    claims: tuple[str, ...] = tuple(CLAIMS)
    """Those to judge anew: 9 is 9a and 9b."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the runs."""


def main(args: Args) -> None:
    unknown = {*args.claims} - {*CLAIMS} - {*map(number_of, CLAIMS)}
    if unknown:
        raise SystemExit(f"there is no claim {', '.join(sorted(unknown))}")
    judged = [key for key in CLAIMS if {key, number_of(key)} & {*args.claims}]
    path = ROOT / "benchmarks/results/claims.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if results.get("weights") != weights_digest():
        results = {"weights": weights_digest()}
    collect()
    for key in judged:
        claim = CLAIMS[key]
        if claim.parts is None:
            continue
        try:
            parts = claim.parts(args.seeds)
            result = judge(parts, args.seeds)
            if claim.seen:
                result["seen"] = claim.seen(args.seeds)
        except NotHereError as error:
            # The figures beside it are those of before.
            print(f"what is seen beside {key} stays as it is: {error}")
        except KeyError as error:
            print(f"{key} stays as it is: there is no run {error}")
            continue
        results[key] = results.get(key, {}) | result
        print(key, verdict_of(parts), *map(str, parts), sep="\n    ")
    for number in dict.fromkeys(map(number_of, judged)):
        try:
            if number in PICTURES:
                picture = ROOT / f"docs/images/claim_{number}.png"
                PICTURES[number](args.seeds).savefig(picture, dpi=100)
        except (NotHereError, KeyError) as error:
            print(f"the picture of {number} stays as it is: {error}")
    results["core_hours"] = results.get("core_hours", {}) | core_hours()
    save_results("claims", results)
    hours = sum(results["core_hours"].values())
    parts = {"verdicts": markdown_of(results), "core-hours": f"{hours:.1f} core-hours\n"}
    if "seen" in results.get("9a", {}):
        parts["rewards by method"] = markdown_of_methods(results["9a"]["seen"])
    fill(ROOT / "docs/claims.md", parts)


def judge(parts: Sequence[Part], seeds: Sequence[int]) -> dict:
    """The entry of a claim in the results."""
    return {
        "verdict": verdict_of(parts),
        "seeds": seeds,
        "other_verdicts": other_verdicts(parts, len(seeds)),
        "parts": {
            part.what: {
                "differences": [*map(float, part.differences)],
                "mean": part.mean,
                "standard_error": part.standard_error,
                "other_errors": part.other_errors(len(seeds)),
                "bounded": part.bounded,
                "verdict": part.verdict,
            }
            for part in parts
        },
    }


def markdown_of(results: dict) -> str:
    rows = []
    for key, claim in CLAIMS.items():
        about = f"{claim.text} ({claim.place})"
        if claim.parts is None:
            rows.append([key, about, claim.why, "**cannot be told**"])
        elif key in results:
            figures = "<br>".join(
                f"{what} {part['mean']:+.3g} ± {part['standard_error']:.2g}"
                + (", *not above 0*" if part.get("bounded") else "")
                for what, part in results[key]["parts"].items()
            )
            verdict = f"**{results[key]['verdict']}**"
            for kind, other in results[key].get("other_verdicts", {}).items():
                verdict += f"<br>by {kind}: {other}"
            rows.append([key, about, figures, verdict])
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
