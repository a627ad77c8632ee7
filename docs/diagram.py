"""Draw ``docs/diagram.png``, the picture of the method in the README: ``python docs/diagram.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, LOOP = "#24292f", "#b3471d"
INPUTS = (
    ("Interactions\nusers x items", "Graph encoder\nusers and items", "#dbe9f6"),
    ("Features\ntext, images, audio", "kNN graphs\none per modality", "#e2f0d9"),
    ("Knowledge graph\nhead, relation, tail", "Graph encoder\nweighted relations", "#fdebd0"),
)


def draw_box(axes: Axes, x: float, y: float, width: float, text: str, colour: str, height: float = 0.8) -> None:
    """Draw a box with its left edge at ``x`` and its middle at ``y``."""
    style = "round,pad=0.02,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y - height / 2), width, height, boxstyle=style, fc=colour, ec=INK, lw=1))
    axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=10, color=INK, linespacing=1.4)


def draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    """Draw a straight arrow."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, lw=1.3, color=colour))


def main() -> None:
    """Draw the picture beside this file."""
    figure, axes = plt.subplots(figsize=(10, 4.1))
    axes.set(xlim=(0, 10.6), ylim=(-0.35, 4.0))
    axes.axis("off")
    for y, (data, encoder, colour) in zip((3.3, 2.1, 0.9), INPUTS, strict=True):
        draw_box(axes, 0.1, y, 2.2, data, colour)
        draw_box(axes, 3.2, y, 2.1, encoder, colour)
        draw_arrow(axes, (2.35, y), (3.15, y))
        draw_arrow(axes, (5.35, y), (6.15, 2.1 + 0.2 * (y - 2.1)))
    draw_box(axes, 6.2, 2.1, 1.7, "Attentive fusion\nof the views", "#eee6f7", 1.0)
    draw_box(axes, 8.7, 2.1, 1.7, "Scores\nusers x items", "#ffffff", 1.0)
    draw_arrow(axes, (7.95, 2.1), (8.65, 2.1))
    axes.plot([7.05, 7.05, 4.25], [1.55, 0.0, 0.0], color=LOOP, lw=1.6)
    draw_arrow(axes, (4.25, 0.0), (4.25, 0.46), LOOP)
    axes.text(7.2, 0.42, "self-loop, after every epoch:\nnearest neighbours among the\nfused items go into all graphs",
              fontsize=9.5, color=LOOP, va="center", linespacing=1.4)  # fmt: skip
    figure.savefig(Path(__file__).with_name("diagram.png"), dpi=130, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
