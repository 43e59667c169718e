"""On PYTHONPATH, hides from a script what the tests alone install: it runs as a user's does.

diffusers and transformers do other things, and load for longer, where these are.
"""

from importlib.machinery import PathFinder

HIDDEN = {"accelerate", "bert_score", "peft", "scipy"}
find_spec = PathFinder.find_spec


def find_visible(name, path=None, target=None):
    return None if name in HIDDEN else find_spec(name, path, target)


PathFinder.find_spec = find_visible
