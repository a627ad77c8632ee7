"""An explanation in one sentence of a line's length.

Its parts, each of them a fact of the explanation, ``serve/explain.py`` and ``serve/explain_linear.py``:

- ``because of A and B``: the user's items that add most to the linear part of the score. This part is exact: the score
  of a linear model is the sum of what the user's items add.
- ``shares RELATION ENTITY with C``: an entity of the knowledge graph that it has in common with an item of the user,
  the rarest.
- ``near D``: items of the user next to it in SLIFMR's correlation graph.
- ``content adds X of Y``: what features and knowledge graph change in the score of a closed form; exact.

The last but one and the one before are what the model had at hand, not parts of the score.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.cells import cell_len

WIDTH = 76
NO_LINK = "no item of the user is linked with it: its learned representation alone"
# How much is said, the most first: parts, items per part, cells per name
_SIZES = [(n, items, cells) for cells in (40, 26) for n in (3, 2) for items in (2, 1)]
_SIZES += [(1, items, cells) for cells in (40, 26, 16) for items in (2, 1)]
_FACT = 24  # cells of a relation, and of an entity


def sentence(explanation: Mapping[str, Any], name: Callable[[str], str], width: int = WIDTH) -> str:
    """Say why an item is recommended.

    Args:
        explanation: of one recommendation.
        name: returns what an item is called, from its token.
        width: cells of a terminal that it may take.
    """
    for n_parts, n_items, cells in _SIZES:
        text = "; ".join(_parts(explanation, name, n_items, cells)[:n_parts]) or NO_LINK
        if cell_len(text) <= width:
            return text
    return shorten(text, width)


def _parts(explanation: Mapping[str, Any], name: Callable[[str], str], n_items: int, cells: int) -> list[str]:
    def called(tokens: Sequence[str]) -> str:
        return " and ".join(shorten(name(token), cells) for token in tokens)

    adding = [near["item"] for near in explanation.get("items", ()) if near["score"] > 0][:n_items]
    parts = [f"because of {called(adding)}"] if adding else []
    if explanation.get("content"):
        score = explanation["interactions"] + explanation["content"]
        parts.append(f"content adds {explanation['content']:.2f} of {score:.2f}")
    sharing = []
    for shared in explanation.get("shared_entities", ())[:1]:
        sharing = shared["items"][:1]
        fact = f"{shorten(end_of(shared['relation']), _FACT)} {shorten(shared['entity'], _FACT)}"
        parts.append(f"shares {fact} with {called(sharing)}")
    near = [other["item"] for other in explanation.get("neighbours", ())]
    near = [item for item in near if item not in (*adding, *sharing)][:n_items]
    if near:
        parts.append(f"near {called(near)}")
    return parts


def end_of(relation: str) -> str:
    """Return the last two parts of a relation's path in readable form: ``film.director.film`` is ``director film``."""
    return " ".join(re.split(r"[./#]+", relation)[-2:]).replace("_", " ").strip() or relation


def shorten(text: str, cells: int) -> str:
    """Return text on one line, cut to so many cells of a terminal with an ellipsis at the end."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    if cell_len(text) <= cells:
        return text
    while cell_len(text) > cells - 1:
        text = text[:-1]
    return text.rstrip() + "…"
