"""Line charts as PNG with numpy alone: panels one below the other, each with axes, a legend and lines.

Capital letters of three by five dots, drawn larger, are all the writing that a curve needs; a plotting library is not.
"""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 900, 360
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 34, 40
DOT = 2
COLOURS = ((30, 90, 200), (210, 60, 40), (40, 150, 70), (120, 120, 120), (150, 70, 170), (220, 150, 20))
# Five rows of three dots each, from the top, as octal digits.
_GLYPHS = dict(
    zip(
        "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ.,:/%-=()+ ",
        [
            "75557",
            "26227",
            "71747",
            "71717",
            "55711",
            "74717",
            "74757",
            "71122",
            "75757",
            "75717",
            "25755",
            "65656",
            "34443",
            "65556",
            "74647",
            "74644",
            "34553",
            "55755",
            "72227",
            "11152",
            "55655",
            "44447",
            "57755",
            "65555",
            "25552",
            "65644",
            "25563",
            "65655",
            "34216",
            "72222",
            "55557",
            "55552",
            "55775",
            "55255",
            "55222",
            "71247",
            "00002",
            "00024",
            "02020",
            "11244",
            "51245",
            "00700",
            "07070",
            "24442",
            "21112",
            "02720",
            "00000",
        ],
        strict=True,
    )
)
Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    points: Sequence[tuple[float, float]]
    is_step: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    x_name: str
    lines: Sequence[Line]
    is_x_log: bool = False
    y_top: float | None = None


def write_png(panels: Sequence[Panel], path: Path) -> None:
    """Draw the panels and write the picture."""
    image = np.concatenate([_draw(panel) for panel in panels])
    height, width, _ = image.shape
    rows = b"".join(b"\0" + row.tobytes() for row in image)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _draw(panel: Panel) -> Pixels:
    image = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    points = [point for line in panel.lines for point in line.points]
    xs = [_x(panel, x) for x, _ in points] or [0.0]
    low, high = min(xs), max(max(xs), min(xs) + 1e-9)
    top = panel.y_top or max([y for _, y in points] + [1e-9]) * 1.05
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across = (_x(panel, x) - low) / (high - low)
        return LEFT + across * (right - LEFT), bottom - min(y / top, 1.0) * (bottom - TOP)

    _write(image, LEFT, 10, panel.title, (0, 0, 0))
    _write(image, right - 2 * DOT * 4 * len(panel.x_name) // 2, HEIGHT - 14, panel.x_name, (0, 0, 0))
    for step in range(5):
        value = top * step / 4
        y = round(place(points[0][0] if points else 0.0, value)[1])
        image[y, LEFT:right] = (225, 225, 225)
        _write(image, 6, y - 5, _number(value), (0, 0, 0))
        x_value = low + (high - low) * step / 4
        text = _number(10**x_value if panel.is_x_log else x_value)
        _write(image, LEFT + (right - LEFT) * step // 4 - 10, bottom + 8, text, (0, 0, 0))
    image[TOP:bottom, LEFT] = image[bottom, LEFT:right] = (0, 0, 0)
    for number, line in enumerate(panel.lines):
        colour = COLOURS[number % len(COLOURS)]
        _write(image, right + 12, TOP + 18 * number, line.name, colour)
        placed = [place(x, y) for x, y in line.points]
        for (x0, y0), (x1, y1) in itertools.pairwise(placed):
            if line.is_step:
                _segment(image, x0, y0, x1, y0, colour)
                _segment(image, x1, y0, x1, y1, colour)
            else:
                _segment(image, x0, y0, x1, y1, colour)
        for mark_x, mark_y in placed if not line.is_step else ():
            image[round(mark_y) - 2 : round(mark_y) + 3, round(mark_x) - 2 : round(mark_x) + 3] = colour
    return image


def _x(panel: Panel, x: float) -> float:
    return math.log10(max(x, 1e-3)) if panel.is_x_log else x


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.1f}" if abs(value) >= 1 else f"{value:.2f}"


def _segment(image: Pixels, x0: float, y0: float, x1: float, y1: float, colour: tuple[int, int, int]) -> None:
    count = int(max(abs(x1 - x0), abs(y1 - y0))) + 1
    xs = np.linspace(x0, x1, count).round().astype(int)
    ys = np.linspace(y0, y1, count).round().astype(int)
    image[ys, xs] = colour
    image[np.minimum(ys + 1, HEIGHT - 1), xs] = colour


def _write(image: Pixels, x: int, y: int, text: str, colour: tuple[int, int, int]) -> None:
    for letter in text.upper():
        for row, digit in enumerate(_GLYPHS.get(letter, "00000")):
            for column in range(3):
                if int(digit) >> (2 - column) & 1:
                    left, up = x + column * DOT, y + row * DOT
                    image[max(up, 0) : up + DOT, left : left + DOT] = colour
        x += 4 * DOT
