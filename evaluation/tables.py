"""The figures of an evaluation as tables in Markdown."""

from evaluation.models import Model, was_trained_on

COLUMNS = {
    "kl": "KL, nats",
    "diversity": "diversity",
    "diversity_judge": "diversity, judge",
    "success": "success",
    "image_quality": "distance to renders",
}
"""What stands right of the rewards, where the figures have it."""


def markdown_table(
    rows: list[tuple[str | None, str, dict]], specs: tuple[str, ...], models: list[Model]
) -> str:
    """Of (prompt or None, model's name, figures): a line each; without prompts, no such column."""
    columns = {key: title for key, title in COLUMNS.items() if key in rows[0][2]}
    header = ["model"] if rows[0][0] is None else ["prompt", "model"]
    for spec in specs:
        header += [f"`{spec}`{who_was_trained_on(spec, models)}", "gain", "wins"]
    lines = [[*header, *columns.values()]]
    for prompt, name, figures in rows:
        line = [name] if prompt is None else [prompt, name]
        for spec in specs:
            figure = figures["rewards"][spec]
            wins = figure.get("win_rate")
            line += [cell(figure, "mean", "standard_error", "+")]
            line += [cell(figure, "gain", "gain_standard_error", "+")]
            line += ["–" if wins is None else f"{wins:.0%}"]
        line += [cell(figures[key]) for key in columns]
        lines.append(line)
    return join(lines)


def join(lines: list[list]) -> str:
    """A table of the cells, of which the first line is the header."""
    lines = [[str(part).replace("|", "\\|") for part in line] for line in lines]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(
    figure: dict | float | None, key: str = "mean", error: str = "standard_error", sign: str = ""
) -> str:
    """A figure with its standard error; a dash where there is none."""
    if not isinstance(figure, dict):
        figure = {key: figure}
    if figure.get(key) is None:
        return "–"
    text = f"{figure[key]:{sign}.3f}"
    return text if figure.get(error) is None else f"{text} ± {figure[error]:.3f}"


def who_was_trained_on(spec: str, models: list[Model]) -> str:
    """For the head of a reward's column: " (held out)", " (trained on)", or which models were."""
    trained = {model.name: was_trained_on(model, spec) for model in models if model.path}
    words = {True: "trained on", False: "held out", None: "not known if trained on"}
    if len(set(trained.values())) < 2:
        return "".join(f" ({words[was]})" for was in set(trained.values()))
    return f" ({', '.join(f'{name}: {words[was]}' for name, was in trained.items())})"
