"""What ``slifmr serve`` answers, as plain data: search, histories, recommendations with reasons, similar items.

The slider mixes relevance with popularity. A score is standardised over all items, so that scores of any model compare,
and so is the logarithm of one plus an item's training interactions: ``(1 - w) z(score) + w z(log(1 + n))``. With
``w = 0`` the order is the model's, with ``w = 1`` that of popularity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.serve.explain import make_explainer
from recbole_slifmr.serve.names import ItemColumns, read_item_columns
from recbole_slifmr.serve.recommend import Ranking, nearest_items, rank_items
from recbole_slifmr.serve.sentence import sentence
from recbole_slifmr.serve.trained import Trained

IMAGE_TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp",
               ".gif": "image/gif", ".avif": "image/avif"}  # fmt: skip
REASON_WIDTH = 160  # cells of a sentence
MAX_WORDS = 8  # of a search


class UnknownError(LookupError):
    """There is no such user or item, or nothing of the kind asked for."""


@dataclass(frozen=True)
class Item:
    """An item: its id, what it is called, what else is known of it, and its users in the training split."""

    item: str
    title: str
    details: str
    image: str | None
    users: int


@dataclass(frozen=True)
class Ranked(Item):
    """An item in a ranking: rank from 1; the model's score, or the cosine with the item asked for; why it is here."""

    rank: int
    score: float
    reason: str | None = None


@dataclass(frozen=True)
class User:
    """A user: the id, and the number of items in the training, validation and test split together."""

    user: str
    items: int


@dataclass(frozen=True)
class UserHistory(User):
    """A user with some of these items, the most popular first."""

    history: list[Item]


@dataclass(frozen=True)
class Found:
    """Users and items that a search finds."""

    users: list[User]
    items: list[Item]


class Lookup:
    """Answers questions about a trained model. Its methods change nothing, so that threads may share it.

    Args:
        trained: the model.
        columns: of the ``.item`` file; the first is the title.
        images: the address of an item's image by its token.
        explain: whether to make ready for reasons; of a closed form this solves it a second time.

    Raises:
        DataError: if the model's scores are not numbers.
    """

    def __init__(
        self, trained: Trained, columns: ItemColumns, images: Mapping[str, str] | None = None, explain: bool = True
    ) -> None:
        self.trained, self.images = trained, images or {}
        tokens, dataset = trained.item_tokens, trained.dataset
        shown = columns.values.reindex(tokens).fillna("").astype(str).to_numpy().tolist()
        described = [[value for value in values if value] for values in shown]
        self.titles = [values[0] if values else str(token) for values, token in zip(described, tokens, strict=True)]
        self.details = [", ".join(values[1:]) for values in described]
        self.item_names = [f"{token}\n{title}".casefold() for token, title in zip(tokens, self.titles, strict=True)]
        self.user_names = [str(token).casefold() for token in trained.user_tokens]
        self.n_items_of = np.diff(trained.seen.bounds)
        items = dataset.inter_feat[dataset.iid_field].cpu().numpy()
        self.n_users_of = np.bincount(items, minlength=trained.n_items)[: trained.n_items]
        popularity = torch.from_numpy(np.log1p(self.n_users_of[1:])).float()
        self.popularity = _standardise(popularity).to(trained.config["device"])
        self.unit = self._or_none(lambda trained: F.normalize(trained.item_vectors().detach(), dim=1))
        self.explainer = self._or_none(make_explainer) if explain else None
        self.recommend(str(trained.user_tokens[1]), 1)  # models keep their representations from the first time on

    def _or_none(self, make: Callable[[Trained], Any]) -> Any:
        try:
            return make(self.trained)
        except SettingError:  # the model has no such thing
            return None

    def about(self) -> dict[str, Any]:
        """Return model, data set, the numbers of users and items, and whether there are reasons and similar items."""
        trained = self.trained
        names = {name: trained.config[name] for name in ("model", "dataset")}
        able = {"explains": self.explainer is not None, "compares": self.unit is not None}
        return {**names, "users": trained.n_users - 1, "items": trained.n_items - 1, **able}

    def search(self, text: str, limit: int) -> Found:
        """Find users by id and items by id or title: whole ids and first words first, then by popularity.

        All words must occur; without any, the users with most items and the most popular items are found.
        """
        words = text.casefold().split()[:MAX_WORDS]
        users = _find(self.user_names, words, self.n_items_of, limit)
        items = _find(self.item_names, words, self.n_users_of, limit)
        return Found([User(*self._user(user)) for user in users], [Item(**self._item(item)) for item in items])

    def user(self, token: str, limit: int, offset: int = 0) -> UserHistory:
        """Return a user with some items."""
        user = self._id(token, self.trained.dataset.uid_field, "user")
        seen = self.trained.seen.of_user(user)
        seen = seen[np.argsort(-self.n_users_of[seen], kind="stable")][offset : offset + limit]
        return UserHistory(*self._user(user), [Item(**self._item(item)) for item in seen.tolist()])

    def item(self, token: str) -> Item:
        """Return an item."""
        return Item(**self._item(self._id(token, self.trained.dataset.iid_field, "item")))

    @torch.no_grad()
    def recommend(self, token: str, k: int, popularity: float = 0.0, explain: bool = False) -> list[Ranked]:
        """Return the k best items that a user has not got.

        Args:
            token: of the user.
            k: items, fewer where fewer may be recommended.
            popularity: the weight of popularity, from 0 to 1, see the module.
            explain: whether to give reasons.
        """
        trained = self.trained
        users = np.array([self._id(token, trained.dataset.uid_field, "user")])
        scores = trained.scores(users)
        mixed = scores.clone()  # rank_items writes into it
        if popularity:
            mixed[:, 1:] = (1 - popularity) * _standardise(scores[:, 1:]) + popularity * self.popularity
        (ranking,) = rank_items(lambda _: mixed, users, k, trained.n_items, trained.seen)
        items = ranking.items[ranking.scores > -np.inf]
        own = scores[0, torch.from_numpy(items).to(scores.device)].cpu().numpy()
        reasons: list[str | None] = [None] * len(items)
        if explain and self.explainer is not None and len(items):
            links = self.explainer.links(Ranking(users, items[None], own[None]))[0]
            reasons = [sentence(link, self._title, REASON_WIDTH) for link in links]
        return self._ranked(items, own, reasons)

    def similar(self, token: str, k: int) -> list[Ranked]:
        """Return the k items nearest to an item by cosine."""
        item = self._id(token, self.trained.dataset.iid_field, "item")
        if self.unit is None:
            raise UnknownError(f"{self.trained.config['model']} has no representations of items to compare")
        items, cosines = nearest_items(self.unit, item, k)
        return self._ranked(items, cosines, [None] * len(items))

    def _ranked(self, items: np.ndarray, scores: np.ndarray, reasons: Sequence[str | None]) -> list[Ranked]:
        return [
            Ranked(**self._item(item), rank=rank, score=float(str(score)), reason=reason)  # str: the few digits it has
            for rank, (item, score, reason) in enumerate(zip(items.tolist(), scores, reasons, strict=True), start=1)
        ]

    def _id(self, token: str, field: str, kind: str) -> int:
        found = self.trained.dataset.field2token_id[field].get(token)
        if not found:  # 0: padding
            raise UnknownError(f"there is no such {kind}")
        return int(found)

    def _user(self, user: int) -> tuple[str, int]:
        return str(self.trained.user_tokens[user]), int(self.n_items_of[user])

    def _item(self, item: int) -> dict[str, Any]:
        token = str(self.trained.item_tokens[item])
        known = {"title": self.titles[item], "details": self.details[item], "image": self.images.get(token)}
        return {"item": token, **known, "users": int(self.n_users_of[item])}

    def _title(self, token: str) -> str:
        return self.titles[self.trained.dataset.field2token_id[self.trained.dataset.iid_field][token]]


def _find(names: Sequence[str], words: Sequence[str], weight: np.ndarray, limit: int) -> list[int]:
    """Return the ids whose names hold all words, without the padding id 0."""
    found: Sequence[int] = range(1, len(names))
    for word in words:
        found = [i for i in found if word in names[i]]
    text, ids = " ".join(words), np.array(found, dtype=np.int64)
    rank = np.array([_closeness(names[i], text) if words else 0 for i in found], dtype=np.int64)
    return ids[np.lexsort((-weight[ids], rank))][:limit].tolist()


def _closeness(name: str, text: str) -> int:
    parts = name.split("\n")
    return 0 if text in parts else 1 if any(part.startswith(text) for part in parts) else 2


def _standardise(values: Tensor) -> Tensor:
    deviation = values.std(dim=-1, correction=0, keepdim=True)
    return (values - values.mean(dim=-1, keepdim=True)) / deviation.clamp_min(1e-12)


def find_images(folder: Path) -> dict[str, Path]:
    """Return the images of a folder by item token: files named by it, such as ``50.jpg``.

    Raises:
        SettingError: if there are none.
    """
    try:
        files = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise SettingError(f"--images: {folder} cannot be read: {error.strerror}") from error
    images = {file.stem: file for file in files if file.suffix.lower() in IMAGE_TYPES and file.is_file()}
    if not images:
        raise SettingError(f"--images: no files such as ITEM.jpg in {folder}; types: {' '.join(IMAGE_TYPES)}")
    return images


def read_image_urls(config: Any, field: str) -> dict[str, str]:
    """Return the https addresses in a column of the ``.item`` file by item token; other values are left out.

    Raises:
        DataError: if there is no such column, or no such address in it.
    """
    values = read_item_columns(config, [field]).values[field].astype(str)
    urls = values[values.str.match(r"https://[^/\s]+\S*$")].to_dict()
    if not urls:
        raise DataError(f"--image_field: no value of '{field}' is an address that begins with https://")
    return urls
