"""Tables of docs/performance.md from the committed results.

python -m benchmarks.performance            prints all of them
python -m benchmarks.performance NAME ...   some: throughput, parts, scaling, transitions,
                                            iterations, memory, hours, gpu
python -m benchmarks.performance --write    puts all of them into the page, between their markers
"""

import contextlib
import io
import json
import sys

from benchmarks.pages import fill, markdown_table
from benchmarks.run import ROOT

# TFLOPS of dense half precision with sums in float32, as the makers state them.
CARDS = {"H100 (SXM), 989 TFLOPS": 989, "RTX 4090, 24 GB, 165 TFLOPS": 165}
ASSUMED = 0.35
"""Share of these that an iteration reaches, on a card that has not been measured."""


def results(name: str) -> dict:
    path = ROOT / f"benchmarks/results/{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def show(header: str, rows: list[list[str]]) -> None:
    """A table in markdown; `header` has its columns, parted by bars."""
    print(markdown_table([column.strip() for column in header.split("|")], rows), end="")


def throughput(source: str = "throughput") -> None:
    rows = []
    for name, result in results(source).items():
        if "ratio" not in result:
            continue
        ratio, peak = result["ratio"], result["peak_gib"]
        cells = [name, f"{ratio['median']:.3f}", f"{ratio['lowest']:.3f} to {ratio['highest']:.3f}"]
        cells += [f"{result['iteration_s']['median']:.2f}", f"{result['bare_s']['median']:.2f}"]
        cells += [f"{result['images_a_second']:.2f}", f"{result['transitions_a_second']:.1f}"]
        cells += [f"{peak:.2f}", f"{100 * result['share_of_matmul']:.0f}%"]
        rows.append(cells)
    show(
        "measured | iteration / bare | lowest to highest | iteration, s | bare, s | images/s "
        "| transitions/s | peak, GiB | of the matmul speed",
        rows,
    )


def parts() -> None:
    names = ("sampling_s", "decoding_s", "reward_s", "training_s", "rest_s")
    rows = [
        [name, *(f"{result['parts'][part]['median']:.2f}" for part in names)]
        for name, result in results("throughput").items()
    ]
    show("measured, s | sampling | decoding | reward | training | rest", rows)


def scaling() -> None:
    rows = []
    for name, result in results("scaling").items():
        points = result["points"]
        for key, unit in (("s", "s"), ("memory_mib", "MiB")):
            values = ", ".join(f"{point['n']}: {point[key]:.4g}" for point in points)
            line = result.get(f"line_of_{key}")
            read = f"{points[-1][key] / points[0][key]:.2f} times the first"
            if line:
                read = f"{line['a']:.3g} + {line['b']:.3g} n, residuals up to "
                read += f"{100 * line['largest_residual']:.1f}%"
            rows.append([name, unit, values, read])
    show("measured against | unit | n: value | reading", rows)


def transitions() -> None:
    rows = []
    for case in results("count").get("transitions", []):
        trained = f"{case['trained'] / 1e6:.2f} M" if case["lora_rank"] else "all"
        cells = [case["layout"], case["dtype"], trained, "yes" if case["checkpointing"] else "no"]
        cells += [str(case["micro_batch"]), f"{case['kept_gib']:.2f}"]
        cells += [f"{case['forward_tflop_a_row']:.3f}", f"{case['training_tflop_a_row']:.3f}"]
        rows.append(cells)
    show(
        "computed | dtype | trained | checkpointing | micro-batch | kept for backward, GiB "
        "| TFLOP a row, forward | with backward",
        rows,
    )


def iterations() -> None:
    rows = []
    for name, case in results("count").get("iterations", {}).items():
        of = case["rows"]
        cells = [name, *(f"{of[key]:.0f}" for key in ("samples", "sample", "reference", "train"))]
        rows.append([*cells, f"{case['tflop']:.3g}"])
    show("computed | samples | rows: sampling | pretrained model | training | TFLOP in all", rows)


def memory() -> None:
    rows = []
    for name, case in results("count").get("iterations", {}).items():
        gib = case["memory"]
        frozen = sum(gib[f"{part}_gib"] for part in ("vae", "text_encoder", "image_reward"))
        trained = sum(gib[f"{part}_gib"] for part in ("lora", "gradients", "adamw"))
        cells = [f"{name}, {case['dtype']}", str(gib["micro_batch"])]
        for size in (gib["unet_gib"] + gib["pretrained_copy_gib"], trained, frozen):
            cells.append(f"{size:.2f}")
        cells.append(f"{gib['rollout_gib'] + gib['pictures_gib']:.2f}")
        for part in ("sampling", "decoding", "reward", "training"):
            cells.append(f"{gib[f'{part}_gib']:.2f}")
        rows.append([*cells, f"{gib['peak_gib']:.1f}"])
    show(
        "computed, GiB | micro-batch | UNet | trained, with gradients and AdamW "
        "| VAE, text encoder, ImageReward | rollout | beside it: sampling | decoding | reward "
        "| training | in all",
        rows,
    )


def beside_the_unet(result: dict) -> tuple[float, float]:
    """Seconds of VAE and reward in an iteration, and the rest of it over the bare calls."""
    once = sum(result["parts"][part]["median"] for part in ("decoding_s", "reward_s"))
    return once, (result["iteration_s"]["median"] - once) / result["bare_s"]["median"]


def shares() -> dict[str, float]:
    """Of the stated rate of each card, what iterations reach: measured in fp16 on the H100.

    Without VAE and reward, which do not grow with the steps of a sample.
    """
    found = dict.fromkeys(CARDS, ASSUMED)
    h100, *_ = CARDS
    reached = [
        result["share_of_matmul"] * result["matmul_tflops"] / beside_the_unet(result)[1]
        for name, result in results("gpu").items()
        if "H100" in name and "fp16," in name and "ratio" in result and "auto" not in name
    ]
    if reached:
        found[h100] = sum(reached) / len(reached) / CARDS[h100]
    return found


def hours() -> None:
    rows, share = [], shares()
    for name, case in results("count").get("iterations", {}).items():
        if case["layout"] == "zoo":
            continue
        work = case["tflop"] * case["iterations"] + case["tflop_once"]
        of_cards = [f"{work / rate / share[card] / 3600:.1f}" for card, rate in CARDS.items()]
        rows.append([name, str(case["iterations"]), f"{work / 1e6:.3g}", *of_cards])
    cards = " | on ".join(f"{card}, {100 * share[card]:.0f} %" for card in CARDS)
    show(f"computed | iterations | EFLOP | hours on {cards}", rows)


def gpu() -> None:
    throughput("gpu")
    print()
    rows = []
    for name, result in results("gpu").items():
        if "ratio" in result:
            once, rest = beside_the_unet(result)
            counted = result["counted"]["peak_gib"]
            rows.append([name, f"{once:.2f}", f"{rest:.2f}"])
            rows[-1] += [f"{result['peak_gib']:.2f}", f"{counted:.2f}"]
            rows[-1] += [str(result["updates_skipped"]), f"{result['first_ratio_off_by']:.1e}"]
    show(
        "measured | VAE and reward, s | iteration without them / bare | peak, GiB | counted, GiB "
        "| updates skipped | first ratio off by",
        rows,
    )
    print()
    rows = []
    for name, result in results("gpu").items():
        if "lines" in result:
            first, last = result["lines"][0], result["lines"][-1]
            skipped = sum(line["updates/skipped"] for line in result["lines"])
            rows.append([name, str(len(result["lines"]))])
            rows[-1] += [f"{line['reward/mean']:.2f}" for line in (first, last)]
            rows[-1] += [str(skipped), f"{first['ratio/first_max_deviation']:.1e}"]
    show("measured | iterations | reward first | last | updates skipped | first ratio off by", rows)


TABLES = (throughput, parts, scaling, transitions, iterations, memory, hours, gpu)


def printed(table) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        table()
    return said.getvalue()


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        tables = {table.__name__: printed(table) for table in TABLES}
        fill(ROOT / "docs/performance.md", tables)
    for table in TABLES:
        if table.__name__ in (sys.argv[1:] or [each.__name__ for each in TABLES]):
            print(printed(table))
