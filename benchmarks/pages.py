"""Tables in markdown, and pages of the docs that have them between markers."""

import re
from collections.abc import Sequence
from pathlib import Path


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def fill(page: Path, parts: dict[str, str]) -> None:
    """Put each part into a page anew, between `<!-- NAME -->` and `<!-- end -->`.

    ValueError where the page has no such place.
    """
    text = page.read_text()
    for name, part in parts.items():
        marked = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(marked, lambda m: m[1] + part + m[2], text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{page} has {count} places for {name}")
    page.write_text(text)
