"""The representations of a trained model, or a closed form's weights, as files for search outside this package."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from torch import Tensor

from recbole_slifmr.errors import SettingError, not_written
from recbole_slifmr.model.linear import LinearRecommender
from recbole_slifmr.nn.linear import Matrix, top_weights
from recbole_slifmr.serve.trained import Trained

FILES = ("users.npy", "users.txt", "items.npy", "items.txt", "items.faiss", "weights.npz")


def export(trained: Trained, out: Path, with_faiss: bool = False, n_weights: int = 200) -> list[Path]:
    """Write users and items so that the inner product of two rows is the model's score of the pair.

    Of a closed form, whose score is the sum of the item's weights on the user's items, ``weights.npz`` holds the
    largest weights in SciPy's sparse format: column j has those of item j. ``items.txt`` names rows and columns. Of a
    SLIFMR with a linear branch there are both, and the score is the sum of both.

    ``users.npy`` and ``items.npy`` are float32, a row per user or item without the padding row; ``users.txt`` and
    ``items.txt`` hold the token of each row, one a line. All of them take the place of those of an earlier export at
    once; nothing else in the folder is changed.

    Args:
        trained: the model.
        out: folder, made if it is missing.
        with_faiss: whether to write ``items.faiss`` too, an exact index for inner products.
        n_weights: weights per item, of a closed form or a linear branch.

    Returns:
        the files.

    Raises:
        SettingError: if the model has no such representations, FAISS is missing or the folder cannot be written there.
        StorageError: if the disk is full or fails; the files of an earlier export stay.
    """
    if with_faiss and importlib.util.find_spec("faiss") is None:
        raise SettingError("--faiss needs FAISS: pip install faiss-cpu, or this package with its extra 'ann'")
    if isinstance(trained.model, LinearRecommender):
        if with_faiss:
            raise SettingError(f"--faiss is for vectors: {trained.config['model']} has weights between items")
        weights = _largest(trained.model.weights, n_weights)

        def write(folder: Path) -> None:
            _write_weights(folder, weights)
            _write_tokens(folder / "items.txt", trained.item_tokens)

        return _replace(out, write)
    users, items = (_rows(embeddings) for embeddings in trained.embeddings())
    branch = trained.linear_branch
    if branch is None:
        return _replace(out, lambda folder: _write_vectors(trained, folder, users, items, with_faiss))
    if with_faiss:
        raise SettingError("--faiss is for scores that are inner products: a linear branch adds to them here")
    weights = _largest(branch.weights, n_weights) * np.float32(branch.scale)

    def write_both(folder: Path) -> None:
        _write_vectors(trained, folder, users, items, False)
        _write_weights(folder, weights)

    return _replace(out, write_both)


def _replace(out: Path, write: Callable[[Path], None]) -> list[Path]:
    """Have files written into a folder beside those of an earlier export, then put them in their place."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export.", dir=out) as part:
            write(Path(part))
            for name in FILES:
                (out / name).unlink(missing_ok=True)
            return [file.replace(out / file.name) for file in (Path(part) / name for name in FILES) if file.is_file()]
    except OSError as error:
        raise not_written(out, error) from error


def _write_vectors(trained: Trained, folder: Path, users: np.ndarray, items: np.ndarray, with_faiss: bool) -> None:
    for name, rows, tokens in (("users", users, trained.user_tokens), ("items", items, trained.item_tokens)):
        np.save(folder / f"{name}.npy", rows)
        _write_tokens(folder / f"{name}.txt", tokens)
    if with_faiss:
        _write_index(folder / "items.faiss", items)


def _largest(weights: Matrix, n_weights: int) -> scipy.sparse.csc_array:
    """Return the largest weights of each column, without the padding item."""
    return top_weights(weights, n_weights)[1:, 1:].astype(np.float32)


def _write_weights(folder: Path, weights: scipy.sparse.csc_array) -> None:
    scipy.sparse.save_npz(folder / "weights.npz", weights)


def _write_tokens(file: Path, tokens: np.ndarray) -> None:
    file.write_text("".join(f"{token}\n" for token in tokens[1:]), encoding="utf-8")


def _rows(embeddings: Tensor) -> np.ndarray:
    return np.ascontiguousarray(embeddings[1:].detach().cpu().numpy(), dtype=np.float32)


def _write_index(path: Path, rows: np.ndarray) -> None:
    import faiss

    index: Any = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(" ".join(str(error).split())) from error
