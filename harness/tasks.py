"""Several rewards, each with its own prompts: --tasks "REWARD PROMPTS [PxG]"."""

import re
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from common.rewards import RewardError, check_spec
from common.users_code import quoted
from harness.args import check_share, fail
from harness.prompts import SourceError, open_prompts

MOST_IMAGES = 1_000_000
"""Of a task in an iteration: far above what any run draws, and below what no memory holds."""


class Task(NamedTuple):
    """A reward with a source of prompts."""

    name: str
    """Of its metrics: the reward's, with a number where two tasks have the same."""
    reward: str
    """Its spec."""
    prompts: Sequence[str]
    num_prompts: int
    """P: prompts an iteration, all ranks together."""
    num_images: int
    """G: images of each."""

    @property
    def num_samples(self) -> int:
        """m = P G: samples an iteration, all ranks together."""
        return self.num_prompts * self.num_images


def read_tasks(args) -> list[Task]:
    """Of args.tasks; fields with blanks are in quotes. What cannot work is refused in one line."""
    tasks, example = [], 'e.g. "image_reward prompts/zoo.txt 8x4"'
    for text in args.tasks:
        sizes = f"{args.prompts_per_task}x{args.images_per_prompt}"
        try:
            reward, source, size = [*shlex.split(text), sizes][:3]
            P, G = map(int, size.split("x"))
        except ValueError:
            P = G = 0
        if P < 1 or G < 1 or len(shlex.split(text)) > 3:
            fail(f'--tasks: {quoted(text)} is not "REWARD PROMPTS [PxG]", {example}')
        task = f"--tasks {quoted(text)}"
        if P * G > MOST_IMAGES:
            fail(f"{task}: {P} x {G} images an iteration are more than {MOST_IMAGES}; take fewer")
        try:
            check_spec(reward)
            prompts = open_prompts(source, args.seed)
        except (RewardError, SourceError, OSError) as error:  # OSError: the cache, or no right
            fail(f"{task}: {error}")
        check_share(f"{task}: its images are", P * G)
        if G == 1 and "statistical_parity" in reward:
            needs = "statistical parity needs several images of a prompt; raise G of PxG"
            fail(f"{task}: {needs}")
        source_of_name = reward.rpartition(":")[2] if ".py:" in reward else reward
        name = re.split(r"[:?]", source_of_name)[0]
        same = sum(task.name.partition("-")[0] == name for task in tasks)
        tasks.append(Task(f"{name}-{same + 1}" if same else name, reward, prompts, P, G))
    if not tasks:
        fail(f"--tasks is empty; give at least one, {example}")
    return tasks
