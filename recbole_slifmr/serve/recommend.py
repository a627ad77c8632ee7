"""Recommendations of a trained model: the best items of every user, the nearest items of an item.

Users are scored some at a time and only their best items are kept, so that memory does not grow with users times items.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor
from torch.nn import functional as F

from recbole_slifmr.data.history import History
from recbole_slifmr.errors import DataError, SettingError, not_written
from recbole_slifmr.files import replace_file
from recbole_slifmr.serve.trained import Trained

FORMATS = ("csv", "jsonl", "parquet")
SCORES_AT_ONCE = 2**24  # 64 MB in single precision


class Ranking(NamedTuple):
    """The best items of some users, best first.

    Attributes:
        users: ids, ``[n]``.
        items: ids, ``[n, k]``.
        scores: ``[n, k]``; minus infinity past the last item that may be recommended.
    """

    users: np.ndarray
    items: np.ndarray
    scores: np.ndarray


def rank_items(
    score: Callable[[np.ndarray], Tensor],
    users: np.ndarray,
    k: int,
    n_items: int,
    seen: History | None = None,
    candidates: np.ndarray | None = None,
) -> Iterator[Ranking]:
    """Find the k best items of each user, some users at a time.

    Args:
        score: returns the scores of all items for some users, ``[n]`` -> ``[n, n_items]``, which may be written to.
        users: ids, ``[n]``.
        k: items per user.
        n_items: number of items; item 0 is padding and never recommended.
        seen: what is never recommended to whom; nothing if None.
        candidates: ids of the items that may be recommended, ``[C]``; all if None.

    Raises:
        DataError: if a score is not a number.
    """
    step = max(SCORES_AT_ONCE // n_items, 1)
    columns = None if candidates is None else torch.from_numpy(candidates)
    for start in range(0, len(users), step):
        chunk = users[start : start + step]
        scores = score(chunk)
        scores[:, 0] = -torch.inf
        if seen is not None:
            scores[tuple(torch.from_numpy(ids).to(scores.device) for ids in seen.cells(chunk))] = -torch.inf
        if columns is not None:
            scores = scores.index_select(1, columns.to(scores.device))
        values, items = (part.cpu() for part in torch.topk(scores, min(k, scores.shape[1]), dim=1))
        if values.isnan().any():
            raise DataError("the model's scores are not numbers (NaN): its training diverged")
        yield Ranking(chunk, (items if columns is None else columns[items]).numpy(), values.numpy())


def recommend(
    trained: Trained, users: np.ndarray, k: int, exclude_seen: bool = True, candidates: np.ndarray | None = None
) -> Iterator[Ranking]:
    """Recommend ``k`` items to each of ``users``, see :func:`rank_items`.

    Args:
        trained: the model.
        users: ids, ``[n]``.
        k: items per user.
        exclude_seen: whether to leave out what a user interacted with in the training, validation or test split.
        candidates: ids of the items that may be recommended, ``[C]``; all if None.
    """
    seen = trained.seen if exclude_seen else None
    return rank_items(trained.scores, users, k, trained.n_items, seen, candidates)


def table(ranking: Ranking, user_tokens: np.ndarray, item_tokens: np.ndarray) -> pd.DataFrame:
    """Return one row per recommendation: user, item, rank from 1, score."""
    valid = ranking.scores > -np.inf
    row, place = np.nonzero(valid)
    columns = {"user": user_tokens[ranking.users[row]], "item": item_tokens[ranking.items[valid]], "rank": place + 1}
    return pd.DataFrame({**columns, "score": ranking.scores[valid]})


def similar_items(trained: Trained, item: int, k: int) -> pd.DataFrame:
    """Return the k items nearest to an item by cosine: item, similar_item, rank from 1, cosine.

    Raises:
        SettingError: if the model has no representations of items.
    """
    items, cosines = nearest_items(F.normalize(trained.item_vectors(), dim=1), item, k)
    tokens = trained.item_tokens
    columns = {"item": tokens[item], "similar_item": tokens[items], "rank": np.arange(1, len(items) + 1)}
    return pd.DataFrame({**columns, "cosine": cosines})


@torch.no_grad()
def nearest_items(unit: Tensor, item: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and cosines of the k items nearest to an item, from rows of length 1, ``[n_items, d]``."""
    cosine = unit @ unit[item]
    cosine[[0, item]] = -torch.inf
    values, items = (part.cpu().numpy() for part in torch.topk(cosine, min(k, len(cosine))))
    kept = values > -np.inf
    return items[kept], values[kept]


def write_tables(tables: Iterable[pd.DataFrame], kind: str, out: Path | None, stdout: TextIO) -> int:
    """Write tables one after the other, into a file whole or not at all.

    Args:
        tables: of the same columns.
        kind: one of ``FORMATS``.
        out: the file; ``stdout`` if None.
        stdout: where to write without a file.

    Returns:
        the number of rows.

    Raises:
        SettingError: if the file cannot be written where it should be, or parquet is to go to ``stdout``.
        StorageError: if the disk is full or fails.
    """
    if out is None:
        if kind == "parquet":
            raise SettingError("parquet is for files: name one with --out")
        return _write_text(tables, kind, stdout)
    if not out.parent.is_dir():
        raise SettingError(f"{out} cannot be written: there is no folder {out.parent}")
    n_rows = 0

    def write(part: Path) -> None:
        nonlocal n_rows
        if kind == "parquet":
            n_rows = _write_parquet(tables, part)
        else:
            with part.open("w", encoding="utf-8", newline="") as file:
                n_rows = _write_text(tables, kind, file)

    try:
        replace_file(out, write)
    except OSError as error:
        raise not_written(out, error) from error
    return n_rows


def _write_text(tables: Iterable[pd.DataFrame], kind: str, file: TextIO) -> int:
    n_rows = 0
    for number, frame in enumerate(tables):
        if kind == "csv":
            writer = csv.writer(file, lineterminator="\n")
            if number == 0:
                writer.writerow(frame.columns)
            writer.writerows(_rows(frame))
        else:
            names = list(frame.columns)
            file.writelines(
                json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n" for row in _rows(frame)
            )
        n_rows += len(frame)
    return n_rows


def _rows(frame: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
    """Yield plain rows; a number in single precision has the few digits that it needs."""
    columns = [frame[name] for name in frame]
    short = [column.astype(str).astype(float) if column.dtype == np.float32 else column for column in columns]
    return zip(*(column.tolist() for column in short), strict=True)


def _write_parquet(tables: Iterable[pd.DataFrame], path: Path) -> int:
    writer, n_rows = None, 0
    try:
        for frame in tables:
            types = [pa.string() if kind.kind == "O" else pa.from_numpy_dtype(kind) for kind in frame.dtypes]
            schema = pa.schema(list(zip(frame.columns, types, strict=True)))
            block = pa.Table.from_pandas(frame, schema, preserve_index=False)
            writer = writer or pyarrow.parquet.ParquetWriter(path, schema)
            writer.write_table(block)
            n_rows += len(frame)
    finally:
        if writer is not None:
            writer.close()
    return n_rows
