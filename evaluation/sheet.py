"""The sheet of pictures that shows models side by side."""

import re

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from harness.args import fail

LEFT, TOP, GAP = 176, 26, 2
"""Pixels: left of the pictures, for the names; above each prompt's, for the prompt; between two."""
SIDE, PIXELS = 256, 1 << 28
"""Of a picture in the sheet, at most; of the sheet, at most: 800 MB of memory."""


def check_sheet(rows: int, prompts: int, columns: int) -> None:
    """Refuse a sheet that no viewer could open: `rows` and `columns` for each of the prompts."""
    height, width = prompts * (TOP + rows * (SIDE + GAP)), LEFT + columns * (SIDE + GAP)
    if height * width > PIXELS:
        flag = "--shown-images" if columns > prompts * rows else "--shown-prompts"
        fail(f"{flag}: comparison.png would have {width} x {height} pixels; show fewer")


def comparison(
    shown: dict[tuple[str, int], np.ndarray], prompts: list[str], names: list[str]
) -> Image.Image:
    """Under each prompt a row for each model and a column for each seed.

    `shown` has the pictures, uint8 (columns, H, W, 3), by the model's name and the prompt's index.
    """
    shape = next(iter(shown.values())).shape
    side = SIDE if shape[1] > SIDE else shape[1] * max(1, 128 // shape[1])
    how = Image.Resampling.LANCZOS if side < shape[1] else Image.Resampling.NEAREST
    indices = sorted({j for _, j in shown})
    block = TOP + len(names) * (side + GAP)
    sheet = Image.new("RGB", (LEFT + shape[0] * (side + GAP), len(indices) * block), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for n, j in enumerate(indices):
        draw.text((LEFT, n * block + 5), prompts[j], "black", font)
        for row, name in enumerate(names):
            y = n * block + TOP + row * (side + GAP)
            draw.text((4, y + 4), "\n".join(re.findall(".{1,20}", name)), "black", font)
            for column, picture in enumerate(shown[name, j]):
                cell = Image.fromarray(picture).resize((side, side), how)
                sheet.paste(cell, (LEFT + column * (side + GAP), y))
    return sheet
