"""The training scripts and the flags of their short runs; a new script is one entry here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Script:
    short: str
    """A short run on the zoo, for tests/faults: samples by four, two updates an iteration."""
    smallest: str
    """The smallest iteration; the test of memory makes 100."""
    needs: str = ""
    """What an iteration of ten samples needs beside the defaults."""
    takes_part: str = ""
    """What makes the algorithm's own parts take part in it."""
    rate: float
    """The learning rate without a flag, for all weights."""
    rate_of_lora: float
    tasks: bool = False
    """It has --tasks in place of --reward and --prompts-file."""
    blocks: tuple[str, ...] = ("policy", "monitoring")
    """Its marked blocks of code, which are the same in every script that has them."""
    calls_at_first: int = 0
    """Calls of the reward in a short run before the first iteration."""
    calls: int = 1
    """Calls of the reward in an iteration of a short run."""


TABLE = {
    "dpok.py": Script(
        short="--samples-per-iteration 4 --batch-size 8 --value-batch-size 8 --replay-rollouts 2",
        smallest="--samples-per-iteration 2 --batch-size 2 --gradient-steps 1",
        takes_part="--value-function",
        rate=1e-5,
        rate_of_lora=1e-5,
        blocks=("policy",),  # its KL is part of the algorithm
    ),
    "ddpo.py": Script(
        short="--samples-per-iteration 4 --min-count 2 --gradient-steps 2",
        smallest="--samples-per-iteration 2 --min-count 1 --gradient-steps 1",
        takes_part="--min-count 2 --gradient-steps 2",
        rate=1e-5,
        rate_of_lora=3e-4,
    ),
    "rwr.py": Script(
        short="--samples-per-iteration 8 --shard-size 4 --batch-size 4 --gradient-steps 2",
        smallest="--samples-per-iteration 2 --shard-size 2 --batch-size 2 --gradient-steps 1",
        needs="--shard-size 5 --batch-size 6 --gradient-steps 2",
        rate=1e-5,
        rate_of_lora=3e-4,
        calls=2,
    ),
    "sft_kl.py": Script(
        short="--dataset-size 8 --shard-size 4 --samples-per-iteration 4 --batch-size 4 "
        "--gradient-steps 2",
        smallest="--dataset-size 2 --shard-size 2 --samples-per-iteration 2 --batch-size 2 "
        "--gradient-steps 1 --gamma 9",
        # A gamma of more than the kB of a JPEG.
        needs="--dataset-size 10 --shard-size 5 --batch-size 6 --gradient-steps 2 --gamma 9",
        rate=2e-5,
        rate_of_lora=2e-5,
        calls_at_first=2,
    ),
    "large_scale_ppo.py": Script(
        short="--pretrain-batch-size 4 --training-timesteps 2",
        smallest="--pretrain-batch-size 2 --training-timesteps 1 "
        "--pretrain-data zoo/pairs.py:biased",
        needs="--pretrain-data zoo/pairs.py:biased --pretrain-batch-size 5 --training-timesteps 3",
        # Fewer updates, in which AdamW amplifies what rounding does.
        takes_part="--training-timesteps 2",
        rate=2e-6,
        rate_of_lora=3e-4,
        tasks=True,
    ),
}
SCRIPTS = tuple(TABLE)
PROMPT = "A green colored rabbit"


def reward_flags(script: str, reward: str, size: str) -> list[str]:
    """The reward; where it is a task's, with prompts of the zoo, PxG: their number and samples."""
    if TABLE[script].tasks:
        return ["--tasks", f"{reward} prompts/zoo.txt {size}"]
    return ["--reward", reward]


def ten_samples(script: str, reward: str, prompts) -> list:
    """What a test of ten samples gives every script: the flags."""
    if TABLE[script].tasks:
        flags = ["--tasks", f"{reward} {prompts} 5x2"]
    else:
        flags = ["--samples-per-iteration", 10, "--reward", reward, "--prompts-file", prompts]
    return [*flags, *TABLE[script].needs.split()]


def tiny(script: str, folder, reward: str) -> list:
    """Ten samples of one prompt in four steps."""
    (folder / "prompt.txt").write_text(PROMPT)
    return ["--num-inference-steps", 4, *ten_samples(script, reward, folder / "prompt.txt")]


def tiny_and_own(script: str, folder, reward: str) -> list:
    """The same, with all the algorithm's own parts."""
    return [*tiny(script, folder, reward), *TABLE[script].takes_part.split()]
