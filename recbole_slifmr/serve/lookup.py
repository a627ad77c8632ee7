"""What ``slifmr serve`` answers, as plain data: search, histories, recommendations with reasons, similar items.

The slider mixes relevance with popularity. A score is standardised over all items, so that scores of any model compare,
and so is the logarithm of one plus an item's training interactions: ``(1 - w) z(score) + w z(log(1 + n))``. With
``w = 0`` the order is the model's, with ``w = 1`` that of popularity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

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
    """An item: its id, what it is called, what else is known of it, and the users it has in the training split."""

    item: str
    title: str
    details: str
    image: str | None
    users: int


@dataclass(frozen=True)
class Recommended(Item):
    """A recommended item: rank from 1, the model's score, and why if that was asked for and the model can say it."""

    rank: int
    score: float
    reason: str | None


@dataclass(frozen=True)
class Similar(Item):
    """A similar item: rank from 1, and the cosine of the two representations."""

    rank: int
    cosine: float


@dataclass(frozen=True)
class User:
    """A user: the id, and the items of the training, validation and test split together."""

    user: str
    items: int


@dataclass(frozen=True)
class Found:
    """Users and items that a search finds."""

    users: list[User]
    items: list[Item]


@dataclass(frozen=True)
class About:
    """What is served: model, data set, their sizes, and what the model can do."""

    model: str
    dataset: str
    users: int
    items: int
    explains: bool
    compares: bool


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
        self.popularity = _standardise(torch.from_numpy(np.log1p(self.n_users_of[1:])).float())
        self.unit = self._unit()
        self.explainer = self._explainer() if explain else None
        self.recommend(str(trained.user_tokens[1]), 1)  # models keep their representations from the first time on

    def _unit(self) -> Tensor | None:
        try:
            return F.normalize(self.trained.item_vectors().detach(), dim=1)
        except SettingError:
            return None

    def _explainer(self) -> Any:
        try:
            return make_explainer(self.trained)
        except SettingError:
            return None

    def about(self) -> About:
        """Say what is served."""
        config, trained = self.trained.config, self.trained
        return About(
            config["model"], config["dataset"], trained.n_users - 1, trained.n_items - 1,
            explains=self.explainer is not None, compares=self.unit is not None,
        )  # fmt: skip

    def search(self, text: str, limit: int) -> Found:
        """Find users by id and items by id or title: whole ids and first words first, then by popularity.

        All words must occur; without any, the users with most items and the most popular items are found.
        """
        words = text.casefold().split()[:MAX_WORDS]
        users, items = (
            _find(self.user_names, words, self.n_items_of, limit),
            _find(self.item_names, words, self.n_users_of, limit),
        )
        return Found([self._user(user) for user in users], [Item(**self._item(item)) for item in items])

    def user(self, token: str) -> User:
        """Return a user."""
        return self._user(self._id(token, self.trained.dataset.uid_field, "user"))

    def item(self, token: str) -> Item:
        """Return an item."""
        return Item(**self._item(self._id(token, self.trained.dataset.iid_field, "item")))

    def history(self, token: str, limit: int, offset: int = 0) -> list[Item]:
        """Return the items of a user in all splits, the most popular first."""
        seen = self.trained.seen.of_user(self._id(token, self.trained.dataset.uid_field, "user"))
        seen = seen[np.argsort(-self.n_users_of[seen], kind="stable")]
        return [Item(**self._item(int(item))) for item in seen[offset : offset + limit]]

    @torch.no_grad()
    def recommend(self, token: str, k: int, popularity: float = 0.0, explain: bool = False) -> list[Recommended]:
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
            mixed[:, 1:] = (1 - popularity) * _standardise(scores[:, 1:])
            mixed[:, 1:] += popularity * self.popularity.to(scores.device)
        (ranking,) = rank_items(lambda _: mixed, users, k, trained.n_items, trained.seen)
        items = ranking.items[ranking.scores > -np.inf]
        own = scores[0, torch.from_numpy(items).to(scores.device)].cpu().numpy()
        reasons: list[str | None] = [None] * len(items)
        if explain and self.explainer is not None and len(items):
            links = self.explainer.links(Ranking(users, items[None], own[None]))[0]
            reasons = [sentence(link, self._title, REASON_WIDTH) for link in links]
        return [
            Recommended(**self._item(int(item)), rank=rank, score=_short(score), reason=reason)
            for rank, (item, score, reason) in enumerate(zip(items, own, reasons, strict=True), start=1)
        ]

    def similar(self, token: str, k: int) -> list[Similar]:
        """Return the k items nearest to an item by cosine."""
        item = self._id(token, self.trained.dataset.iid_field, "item")
        if self.unit is None:
            raise UnknownError(f"{self.trained.config['model']} has no representations of items to compare")
        items, cosines = nearest_items(self.unit, item, k)
        return [
            Similar(**self._item(int(near)), rank=rank, cosine=_short(cosine))
            for rank, (near, cosine) in enumerate(zip(items, cosines, strict=True), start=1)
        ]

    def _id(self, token: str, field: str, kind: str) -> int:
        found = self.trained.dataset.field2token_id[field].get(token)
        if not found:  # 0: padding
            raise UnknownError(f"there is no such {kind}")
        return int(found)

    def _user(self, user: int) -> User:
        return User(str(self.trained.user_tokens[user]), int(self.n_items_of[user]))

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
    return (values - values.mean(dim=-1, keepdim=True)) / values.std(dim=-1, correction=0, keepdim=True).clamp_min(
        1e-12
    )


def _short(value: np.float32) -> float:
    """Return a number in single precision with the few digits that it needs."""
    return float(str(value))


def find_images(folder: Path) -> dict[str, Path]:
    """Return the images of a folder by item token: files named by it, such as ``50.jpg``.

    Raises:
        SettingError: if there are none.
    """
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    images = {file.stem: file for file in files if file.suffix.lower() in IMAGE_TYPES and file.is_file()}
    if not images:
        raise SettingError(f"--images: no files such as ITEM.jpg in {folder}; types: {' '.join(IMAGE_TYPES)}")
    return images


def image_address(token: str) -> str:
    """Return where the page finds an image of the folder."""
    return f"image?item={quote(token, safe='')}"


def read_image_urls(config: Any, field: str) -> dict[str, str]:
    """Return the https addresses in a column of the ``.item`` file by item token; other values are left out.

    Raises:
        DataError: if there is no such column, or no such address in it.
    """
    values = read_item_columns(config, [field]).values[field]
    urls = {str(token): str(value) for token, value in values.items() if is_https(str(value))}
    if not urls:
        raise DataError(f"--image_field: no value of '{field}' is an address that begins with https://")
    return urls


def is_https(text: str) -> bool:
    """Say whether a text is a whole https address."""
    try:
        return urlsplit(text).scheme == "https" and bool(urlsplit(text).hostname)
    except ValueError:
        return False
