"""What a long job needs around an algorithm; a script takes all of it from here."""

from harness.args import (
    RunArgs,
    check_folder,
    check_memory,
    check_reward,
    check_sampler,
    check_share,
    parse_args,
)
from harness.guard import command
from harness.loops import micro_batches, progress
from harness.memory import even_size, fit_micro_batches, rollout_storage
from harness.prompts import read_prompts, tag_of, warn_of_prompts
from harness.resume import digests_of_code
from harness.rewards import load_run_reward, score_with_gradients, scores_of
from harness.run import Run
from harness.seeds import GRID, PRETRAINING, PROGRESS, ROLLOUT, UPDATES, VALUE, seeded
from harness.stop import fail, require
from harness.stored import read_stored

__all__ = [
    "GRID",
    "PRETRAINING",
    "PROGRESS",
    "ROLLOUT",
    "UPDATES",
    "VALUE",
    "Run",
    "RunArgs",
    "check_folder",
    "check_memory",
    "check_reward",
    "check_sampler",
    "check_share",
    "command",
    "digests_of_code",
    "even_size",
    "fail",
    "fit_micro_batches",
    "load_run_reward",
    "micro_batches",
    "parse_args",
    "progress",
    "read_prompts",
    "read_stored",
    "require",
    "rollout_storage",
    "score_with_gradients",
    "scores_of",
    "seeded",
    "tag_of",
    "warn_of_prompts",
]
