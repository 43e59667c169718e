"""What pip's commands run: dpok, evaluate, export_run, ... (pyproject.toml).

Each is the script of that name, which finds common/, harness/ and the other folders beside it.
"""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = {"export_run": "evaluation/export.py"}


def main() -> None:
    """Run the script that the command is named after."""
    name = Path(sys.argv[0]).stem
    sys.path.insert(0, str(HERE))
    from harness import project

    project.called_as = name
    runpy.run_path(str(HERE / FILES.get(name, f"{name}.py")), run_name="__main__")
