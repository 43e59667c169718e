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
    gradient: bool = False
    """It needs the gradient of the reward."""
    steps: int = 50
    """Steps of a sample without a flag."""


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
    "raft.py": Script(
        short="--samples-per-iteration 4 --images-per-prompt 2 --acceptance 0.5 "
        "--gradient-steps 2 --pretrain-batch-size 4",
        smallest="--samples-per-iteration 2 --images-per-prompt 2 --acceptance 0.5 "
        "--pretrain-batch-size 2 --pretrain-data zoo/pairs.py:biased "
        "--prompts-file prompts/zoo.txt",
        needs="--images-per-prompt 2 --acceptance 0.5 --pretrain-data zoo/pairs.py:biased "
        "--pretrain-batch-size 5",
        takes_part="--gradient-steps 2",
        rate=3e-6,
        rate_of_lora=3e-4,
        blocks=("policy", "monitoring", "pre-training"),
    ),
    "reward_weighted.py": Script(
        short="--samples-per-iteration 4 --images-per-prompt 2 --watched-prompts 1 "
        "--gradient-steps 2 --pretrain-batch-size 4",
        smallest="--samples-per-iteration 2 --images-per-prompt 2 --watched-prompts 1 "
        "--pretrain-batch-size 2 --pretrain-data zoo/pairs.py:biased "
        "--prompts-file prompts/zoo.txt",
        needs="--images-per-prompt 2 --pretrain-data zoo/pairs.py:biased --pretrain-batch-size 5",
        takes_part="--gradient-steps 2",
        rate=1e-5,
        rate_of_lora=3e-4,
        blocks=("policy", "monitoring", "pre-training"),
        calls=2,
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
        blocks=("policy", "monitoring", "pre-training"),
        tasks=True,
    ),
    "refl.py": Script(
        short="--samples-per-iteration 4 --pretrain-batch-size 4 --most-steps-left 2",
        smallest="--samples-per-iteration 2 --pretrain-batch-size 2 --most-steps-left 2 "
        "--pretrain-data zoo/pairs.py:biased --prompts-file prompts/zoo.txt",
        needs="--pretrain-data zoo/pairs.py:biased --pretrain-batch-size 5 --most-steps-left 4",
        rate=1e-5,
        rate_of_lora=3e-4,
        blocks=("policy", "monitoring", "pre-training"),
        gradient=True,
        steps=40,
    ),
    "draft.py": Script(
        short="--samples-per-iteration 4 --num-noise 1",
        smallest="--samples-per-iteration 2 --num-noise 0 --prompts-file prompts/zoo.txt",
        rate=1e-5,
        rate_of_lora=5e-5,
        gradient=True,
        calls=2,  # of four samples, and of their four pictures more
    ),
}
SCRIPTS = tuple(TABLE)
KILLED = ("dpok.py", "rwr.py", "sft_kl.py", "large_scale_ppo.py")
"""What tests/faults kills, which takes a minute each: every way in which a script keeps its state.

ddpo.py, raft.py and draft.py keep nothing that dpok.py does not; reward_weighted.py and refl.py
have units in an iteration as sft_kl.py has.
"""
PROMPT = "A green colored rabbit"
PROMPTS = [PROMPT, "Four wolves in the park"]


def usable(script: str, reward: str) -> str:
    """The reward, or one with a gradient where the size of a JPEG has none."""
    return (
        "image_reward:zoo/image_reward" if TABLE[script].gradient and "jpeg" in reward else reward
    )


def reward_flags(script: str, reward: str, size: str) -> list[str]:
    """The reward; where it is a task's, with prompts of the zoo, PxG: their number and samples."""
    if TABLE[script].tasks:
        return ["--tasks", f"{reward} prompts/zoo.txt {size}"]
    return ["--reward", usable(script, reward)]


def ten_samples(script: str, reward: str, prompts) -> list:
    """What a test of ten samples gives every script: the flags."""
    if TABLE[script].tasks:
        flags = ["--tasks", f"{reward} {prompts} 5x2"]
    else:
        flags = ["--samples-per-iteration", 10, "--prompts-file", prompts]
        flags += reward_flags(script, reward, "5x2")
    return [*flags, *TABLE[script].needs.split()]


def tiny(script: str, folder, reward: str) -> list:
    """Ten samples of two prompts in four steps."""
    (folder / "prompt.txt").write_text("\n".join(PROMPTS))
    return ["--num-inference-steps", 4, *ten_samples(script, reward, folder / "prompt.txt")]


def tiny_and_own(script: str, folder, reward: str) -> list:
    """The same, with all the algorithm's own parts."""
    return [*tiny(script, folder, reward), *TABLE[script].takes_part.split()]
