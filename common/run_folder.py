"""What a run leaves behind: metrics as JSON lines and TensorBoard events, a learning curve, whole checkpoints."""

import json
import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


def run_name(script: str, args) -> str:
    """<script>__<tag>__<seed>__<time>, the tag from the prompt, the prompts' file or the tasks' rewards."""
    if "tasks" in asdict(args):
        text = " ".join(task.split()[0].partition(":")[0] for task in args.tasks)
    else:
        text = args.prompts_file.stem if args.prompts_file else args.prompt
    tag = re.sub(r"[^a-z0-9]+", "-", text.lower())[:40].strip("-") or "prompt"
    return f"{Path(script).stem}__{tag}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"


class RunFolder:
    """Writes a run's files; for rank 0. On resume the lines of iterations from `first_iteration` on are dropped."""

    def __init__(self, path: Path, args, first_iteration: int = 0):
        self.path, self.wandb, metrics = path, None, path / "metrics.jsonl"
        (path / "samples").mkdir(parents=True, exist_ok=True)
        lines = metrics.read_text().splitlines() if first_iteration else []
        self.history = [line for line in map(json.loads, lines) if line["iteration"] < first_iteration]
        metrics.write_text("".join(json.dumps(line) + "\n" for line in self.history))
        (path / "args.json").write_text(json.dumps(asdict(args), indent=2, default=str) + "\n")
        self.writer = SummaryWriter(path, purge_step=first_iteration)
        if args.track:
            import wandb

            self.wandb = wandb
            wandb.init(project="clean-diffusion-rl", name=path.name, config=asdict(args))

    def log(self, metrics: dict[str, float]) -> None:
        """Append one iteration's numbers everywhere."""
        self.history.append(metrics)
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, metrics["iteration"])
        self.writer.flush()
        if self.wandb:
            self.wandb.log(metrics, step=metrics["iteration"])

    def save_learning_curve(self) -> None:
        """learning_curve.png: reward (mean and std) and KL to the pretrained model against reward queries."""
        from matplotlib.figure import Figure

        samples, mean, std = ([line[key] for line in self.history] for key in ("samples", "reward/mean", "reward/std"))
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(samples, mean)
        left.fill_between(samples, [a - b for a, b in zip(mean, std)], [a + b for a, b in zip(mean, std)], alpha=0.2)
        left.set(xlabel="reward queries", ylabel="reward (mean, std)")
        if "kl/pretrained" in self.history[0]:
            right.plot(samples, [line["kl/pretrained"] for line in self.history], color="tab:orange")
        right.set(xlabel="reward queries", ylabel="KL to the pretrained model (nats)")
        figure.savefig(self.path / "learning_curve.png", dpi=110)


def replace_folder(partial: Path, folder: Path) -> None:
    """Put the finished `partial` in the place of `folder`, which stays whole until then."""
    old = folder.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
