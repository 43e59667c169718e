"""A run's folder on the Hugging Face Hub."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from common.lora import FILE_NAME
from harness.export import EXPORTED
from harness.project import call_of_export
from harness.stop import end_run, fail

FILES = (
    "README.md",
    FILE_NAME,
    EXPORTED,
    "unet/*",
    "learning_curve.png",
    "samples/*.png",
    "metrics.jsonl",
)
"""Of a run's folder. What it learned from, its checkpoint, and args.json, which has paths of this
machine, stay here."""


def check_push(repo: str | None) -> None:
    """Refuse --push-to-hub without a token, or to what is no name of a repository."""
    if repo is None:
        return
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        fail(f"--push-to-hub {repo}: {error}; give OWNER/NAME")
    if get_token() is None:
        fail("--push-to-hub needs a token of the hub: hf auth login, or the variable HF_TOKEN")


def push(run: Path, repo: str) -> str:
    """Upload FILES to the model `repo`, which is made where it is not there; its address."""
    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    about = {"folder_path": run, "allow_patterns": [*FILES]}
    api.upload_folder(repo_id=repo, commit_message="Upload the run", **about)
    return f"{api.endpoint}/{repo}"


def push_or_end(run: Path, repo: str) -> None:
    """`push`; a fault is one line that says how to do it later, and exit code 1."""
    try:
        print(f"on the hub: {push(run, repo)}")
    except Exception as error:  # the hub's client and its transport raise many kinds
        later = shlex.join([*call_of_export(), str(run), "--push-to-hub", repo])
        end_run(f"{run} is whole, but was not pushed ({str(error)[:200]}); later: {later}")
