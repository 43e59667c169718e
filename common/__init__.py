"""The model, the denoising step with its log-prob, the LoRA and the rewards."""

import os

# Importing diffusers makes transformers warn that torchvision is missing, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


class UserError(ValueError):
    """What the user can mend; the message is one line."""
