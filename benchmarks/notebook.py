"""Execute docs/first_steps.ipynb, and keep its outputs in it.

    python -m benchmarks.notebook

It needs requirements-test.txt. The run and its evaluation stay in runs/.
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs/first_steps.ipynb"


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of its cells, which run in its folder.

    What a cell prints is one text, as it stands in a terminal in the end: progress bars are written
    over. Raises nbclient's CellExecutionError where a cell does.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(NOTEBOOK), NOTEBOOK)
