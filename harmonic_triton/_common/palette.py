"""How every picture of the project tells its series apart: by colour for all eyes, and without colour by dashes and markers."""

from __future__ import annotations

from typing import Any

# Okabe and Ito, *Color Universal Design* (2008), without the yellow, which white paper swallows.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A7A7A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (3, 1)), (0, (1, 3)))


def line_style(number: int) -> dict[str, Any]:
    """Colour and dashes of a line; the first eight lines differ in both."""
    return {"color": PALETTE[number % len(PALETTE)], "linestyle": DASHES[number % len(DASHES)]}
