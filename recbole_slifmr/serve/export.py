"""The representations of a trained model, or a closed form's weights, as files for search outside this package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from torch import Tensor

from recbole_slifmr.errors import SettingError
from recbole_slifmr.files import replace_file
from recbole_slifmr.model.linear import LinearRecommender
from recbole_slifmr.nn.linear import Matrix, top_weights
from recbole_slifmr.serve.trained import Trained


def export(trained: Trained, out: Path, with_faiss: bool = False, n_weights: int = 200) -> list[Path]:
    """Write users and items so that the inner product of two rows is the model's score of the pair.

    Of a closed form, whose score is the sum of the item's weights on the user's items, ``weights.npz`` holds the
    largest weights in SciPy's sparse format: column j has those of item j. ``items.txt`` names rows and columns. Of a
    SLIFMR with a linear branch there are both, and the score is the sum of both.

    ``users.npy`` and ``items.npy`` are float32, a row per user or item without the padding row; ``users.txt`` and
    ``items.txt`` hold the token of each row, one a line.

    Args:
        trained: the model.
        out: folder, made if it is missing.
        with_faiss: whether to write ``items.faiss`` too, an exact index for inner products.
        n_weights: weights per item, of a closed form or a linear branch.

    Returns:
        the files.

    Raises:
        SettingError: if the model has no such representations, FAISS is missing or the folder cannot be written.
    """
    if with_faiss and importlib.util.find_spec("faiss") is None:
        raise SettingError("--faiss needs FAISS: pip install faiss-cpu, or this package with its extra 'ann'")
    if isinstance(trained.model, LinearRecommender):
        if with_faiss:
            raise SettingError(f"--faiss is for vectors: {trained.config['model']} has weights between items")
        weights = _largest(trained.model.weights, n_weights)
        return _write(
            lambda: [_write_weights(out, weights), _write_tokens(out / "items.txt", trained.item_tokens)], out
        )
    users, items = (_rows(embeddings) for embeddings in trained.embeddings())
    branch = trained.linear_branch
    if branch is None:
        return _write(lambda: _write_vectors(trained, out, users, items, with_faiss), out)
    if with_faiss:
        raise SettingError("--faiss is for scores that are inner products: a linear branch adds to them here")
    weights = _largest(branch.weights, n_weights) * np.float32(branch.scale)
    return _write(
        lambda: [*_write_vectors(trained, out, users, items, False), _write_weights(out, weights)],
        out,
    )


def _write(write: Callable[[], list[Path]], out: Path) -> list[Path]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        return write()
    except OSError as error:
        raise SettingError(f"{out} cannot be written: {error.strerror or error}") from error


def _write_vectors(trained: Trained, out: Path, users: np.ndarray, items: np.ndarray, with_faiss: bool) -> list[Path]:
    files = []
    for name, rows, tokens in (("users", users, trained.user_tokens), ("items", items, trained.item_tokens)):
        files.append(out / f"{name}.npy")
        replace_file(files[-1], lambda part, rows=rows: _save(part, rows))  # type: ignore[misc]
        files.append(_write_tokens(out / f"{name}.txt", tokens))
    if with_faiss:
        files.append(out / "items.faiss")
        replace_file(files[-1], lambda part: _save_index(part, items))
    return files


def _largest(weights: Matrix, n_weights: int) -> scipy.sparse.csc_array:
    """Return the largest weights of each column, without the padding item."""
    return top_weights(weights, n_weights)[1:, 1:].astype(np.float32)


def _write_weights(out: Path, weights: scipy.sparse.csc_array) -> Path:
    file = out / "weights.npz"
    replace_file(file, lambda part: _save_sparse(part, weights))
    return file


def _write_tokens(file: Path, tokens: np.ndarray) -> Path:
    text = "".join(f"{token}\n" for token in tokens[1:])
    replace_file(file, lambda part: part.write_text(text, encoding="utf-8"))
    return file


def _rows(embeddings: Tensor) -> np.ndarray:
    return np.ascontiguousarray(embeddings[1:].detach().cpu().numpy(), dtype=np.float32)


def _save(path: Path, rows: np.ndarray) -> None:
    with path.open("wb") as file:  # given a name, numpy adds .npy to it
        np.save(file, rows)


def _save_sparse(path: Path, weights: scipy.sparse.csc_array) -> None:
    with path.open("wb") as file:
        scipy.sparse.save_npz(file, weights)


def _save_index(path: Path, rows: np.ndarray) -> None:
    import faiss

    index: Any = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    faiss.write_index(index, str(path))
