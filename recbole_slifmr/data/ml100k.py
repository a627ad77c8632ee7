"""Text features for RecBole's bundled ml-100k, computed from title, genres and year on first use."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recbole_slifmr.data.extract import TFIDF, check_target, tfidf_vectors, write_features
from recbole_slifmr.data.vectors import OWN_IDS, ItemFile

SOURCE = {"file": "text.npy", "ids": f"text{OWN_IDS}"}  # named: an items.txt may belong to other features


def text_features(item_file: ItemFile) -> tuple[list[str], np.ndarray]:
    """Return item tokens ``[n]`` and TF-IDF vectors ``[n, d]`` of title, genres, year and decade."""
    items = item_file.columns("movie_title", "class", "release_year")
    decade = "decade" + items["release_year"].str[:3]
    text = items["movie_title"] + " " + items["class"] + " year" + items["release_year"] + " " + decade
    return items.index.tolist(), tfidf_vectors(text)


def ensure_text_features(item_file: ItemFile, folder: Path) -> None:
    """Write the files of ``SOURCE`` into the folder unless they are there.

    Raises:
        SettingError: if the folder cannot be written to.
    """
    if all((folder / file).is_file() for file in SOURCE.values()):
        return
    tokens, values = text_features(item_file)
    check_target(folder, "text", overwrite=True)
    fields = ["movie_title", "class", "release_year", "decade"]
    write_features(folder, "text", tokens, [values], values.shape[1], model=TFIDF, fields=fields, dataset="ml-100k")
