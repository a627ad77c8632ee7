"""The representations of a trained model as files, for search outside Python or with FAISS."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from recbole_slifmr.errors import SettingError
from recbole_slifmr.files import replace_file
from recbole_slifmr.serve.trained import Trained


def export(trained: Trained, out: Path, with_faiss: bool = False) -> list[Path]:
    """Write users and items so that the inner product of two rows is the model's score of the pair.

    ``users.npy`` and ``items.npy`` are float32, a row per user or item without the padding row; ``users.txt`` and
    ``items.txt`` hold the token of each row, one a line.

    Args:
        trained: the model.
        out: folder, made if it is missing.
        with_faiss: whether to write ``items.faiss`` too, an exact index for inner products.

    Returns:
        the files.

    Raises:
        SettingError: if the model has no such representations, FAISS is missing or the folder cannot be written.
    """
    if with_faiss and importlib.util.find_spec("faiss") is None:
        raise SettingError("--faiss needs FAISS: pip install faiss-cpu, or this package with its extra 'ann'")
    users, items = (_rows(embeddings) for embeddings in trained.embeddings())
    files = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, rows, tokens in (("users", users, trained.user_tokens), ("items", items, trained.item_tokens)):
            files += [out / f"{name}.npy", out / f"{name}.txt"]
            replace_file(files[-2], lambda part, rows=rows: _save(part, rows))  # type: ignore[misc]
            text = "".join(f"{token}\n" for token in tokens[1:])
            replace_file(files[-1], lambda part, text=text: part.write_text(text, encoding="utf-8"))  # type: ignore[misc]
        if with_faiss:
            files.append(out / "items.faiss")
            replace_file(files[-1], lambda part: _save_index(part, items))
    except OSError as error:
        raise SettingError(f"{out} cannot be written: {error.strerror or error}") from error
    return files


def _rows(embeddings: Tensor) -> np.ndarray:
    return np.ascontiguousarray(embeddings[1:].detach().cpu().numpy(), dtype=np.float32)


def _save(path: Path, rows: np.ndarray) -> None:
    with path.open("wb") as file:  # given a name, numpy adds .npy to it
        np.save(file, rows)


def _save_index(path: Path, rows: np.ndarray) -> None:
    import faiss

    index: Any = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    faiss.write_index(index, str(path))
