"""What is the same mathematics in every script, and the plumbing around it."""

import os

# Importing diffusers makes transformers warn that torchvision is missing, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
