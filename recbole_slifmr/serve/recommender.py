"""Train and recommend from Python, with frames of pandas or an atomic data set; see ``docs/recommend.md``.

What the commands do, on temporary files: ``convert csv``, ``train``, ``recommend``. The scores are theirs.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_slifmr.data.convert.frames import NAME, as_tokens, convert_frames, find_column, is_whole, tokens_of
from recbole_slifmr.data.new_items import read_new_items
from recbole_slifmr.errors import DataError, SettingError, UnknownSettingWarning, not_written
from recbole_slifmr.files import replace_folder, write_json
from recbole_slifmr.serve.evaluate import evaluate
from recbole_slifmr.serve.explain import make_explainer
from recbole_slifmr.serve.new_items import NewItemScorer, check_model
from recbole_slifmr.serve.newcomers import Score, recommend_for, scorer
from recbole_slifmr.serve.recommend import Ranking, recommend, similar_items, table
from recbole_slifmr.serve.trained import Trained, load_trained
from recbole_slifmr.training.experiment import Result, run

CHECKPOINT, ABOUT, DATA = "checkpoint.pth", "recommender.json", "data"
QUIET = {"show_progress": False, "state": "WARNING"}


class Recommender:
    """A model to train on data in memory and to ask for recommendations.

    Nothing is printed and no file stays: what training writes goes with the object, unless it is saved.

    Args:
        model: name of a model of this package or of RecBole, or ``package.module:Class`` of one of your own.
        settings: of RecBole and the model, as on the command line: ``epochs=50``, ``show_progress=True``.

    Attributes:
        result: of the training, see :class:`~recbole_slifmr.training.experiment.Result`; None before and after loading.
    """

    def __init__(self, model: str = "SLIFMR", **settings: Any) -> None:
        self.model, self.settings = model, settings
        self.result: Result | None = None
        self._trained: Trained | None = None
        self._checkpoint = self._data = Path()  # where they are once it is trained
        self._about: dict[str, Any] = {}
        self._explainer: Any = None  # these two are made when they are first asked for
        self._scorer: Score | None = None
        self._remove: Any = None

    def __repr__(self) -> str:
        if self._trained is None:
            return f"Recommender('{self.model}'), not trained"
        n_users, n_items = self._trained.n_users - 1, self._trained.n_items - 1
        return f"Recommender('{self.model}'): {n_users} users, {n_items} items"

    def fit(
        self,
        interactions: pd.DataFrame | str | Path,
        items: pd.DataFrame | None = None,
        triples: pd.DataFrame | None = None,
        links: pd.DataFrame | None = None,
        features: Mapping[str, Any] | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> Recommender:
        """Train the model.

        Args:
            interactions: a frame with a row per interaction (user, item, perhaps rating and time); or the name or the
                folder of a data set in atomic files, and then nothing else.
            items: a row per item and anything about it.
            triples: head, relation and tail of each triple of the knowledge graph.
            links: item and entity; without it an item is the entity of the same token.
            features: per modality (``text``, ``image``) an array ``[n, d]`` with a row per row of ``items``, or a frame
                whose column of items or whose index names the item of each row.
            columns: names of columns that are not called as usual, by what they hold: user, item, rating, time, head,
                relation, tail, entity.

        Returns:
            itself.

        Raises:
            DataError: for data that cannot be used.
            SettingError: for an unknown model or setting, or one that cannot be used.
        """
        folder = Path(tempfile.mkdtemp(prefix="slifmr-"))
        remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        own: dict[str, Any] = {}
        about: dict[str, Any] = {"columns": dict(columns or {}), "numbers": []}
        try:
            if isinstance(interactions, (str, Path)):
                if any(other is not None for other in (items, triples, links, features, columns)):
                    raise SettingError(
                        "a data set in files has items, triples, links and features of its own: leave them out"
                    )
                name, given = str(interactions), Path(interactions).resolve()
                if any(given.glob("*.inter")):
                    name, own = given.name, {"data_path": str(given.parent)}
            else:
                convert_frames(folder / DATA, interactions, items, triples, links, features, columns)
                name, own = NAME, {"data_path": str(folder / DATA)}
                about["numbers"] = [
                    role
                    for role in ("user", "item")
                    if is_whole(interactions[find_column(interactions, "interactions", role, columns or {})])
                ]
            settings = {"checkpoint_dir": str(folder), **QUIET, **self.settings, **own}
            with _quiet():
                result = run(self.model, name, settings=settings, log=False)
                assert result.checkpoint is not None
                trained = load_trained(result.checkpoint, own.get("data_path"))
        except BaseException:
            remove()
            raise
        self._adopt(trained, result.checkpoint, {**about, "dataset": name, "test": _floats(result.test)}, remove)
        self.result = result
        return self

    def _adopt(self, trained: Trained, checkpoint: Path, about: dict[str, Any], remove: Any = None) -> None:
        if self._remove is not None:  # what an earlier training left
            self._remove()
        self._trained, self._checkpoint, self._about, self._remove = trained, checkpoint, about, remove
        self._explainer = self._scorer = None
        self._data = Path(trained.dataset.dataset_path)

    @property
    def trained(self) -> Trained:
        """The trained model, its data and the ids of users and items.

        Raises:
            SettingError: before :meth:`fit`.
        """
        if self._trained is None:
            raise SettingError(f"{self.model} is not trained yet: call fit first")
        return self._trained

    def recommend(
        self, users: Any = None, k: int = 10, exclude_seen: bool = True, candidates: Any = None
    ) -> pd.DataFrame:
        """Return the best items of users: user, item, rank from 1, score.

        Args:
            users: one or several, named as in the data; everybody if None.
            k: items per user, fewer where fewer may be recommended.
            exclude_seen: whether to leave out the user's items in the training, validation and test split.
            candidates: the items that may be recommended; all if None.

        Raises:
            DataError: naming users or items that are unknown.
        """
        trained = self.trained
        ids = np.arange(1, trained.n_users) if users is None else trained.user_ids(_tokens(users))
        allowed = None if candidates is None else trained.item_ids(_tokens(candidates))
        rankings = recommend(trained, ids, _positive(k), exclude_seen, allowed)
        return self._as_given([table(ranking, trained.user_tokens, trained.item_tokens) for ranking in rankings])

    def recommend_for(self, history: Any, k: int = 10, candidates: Any = None) -> pd.DataFrame:
        """Return the best items of a user who was not in training: item, rank from 1, score.

        Exact for EASE and the closed forms, otherwise in part an approximation: see ``docs/recommend.md``.

        Args:
            history: the items that the user has, which are never recommended.
            k: items, fewer where fewer may be recommended.
            candidates: the items that may be recommended; all if None.

        Raises:
            DataError: naming items that are unknown.
            SettingError: for a model that knows users by their own embeddings only.
        """
        trained = self.trained
        known = [trained.item_ids(_tokens(history))]
        allowed = None if candidates is None else trained.item_ids(_tokens(candidates))
        if self._scorer is None:
            self._scorer = scorer(trained)
        (ranking,) = recommend_for(self._scorer, known, _positive(k), trained.n_items, allowed)
        return self._as_given([table(ranking, np.array([""]), trained.item_tokens).drop(columns="user")])

    def recommend_new(
        self,
        items: pd.DataFrame,
        triples: pd.DataFrame | None = None,
        features: Mapping[str, Any] | None = None,
        users: Any = None,
        history: Any = None,
        k: int = 10,
    ) -> pd.DataFrame:
        """Return the best of items that were not in training, by what is known of them: user, item, rank, score.

        Exact for CEASE, AddEASE and L3AE, otherwise in part an approximation: see ``docs/recommend.md``.

        Args:
            items: a row per new item, as for :meth:`fit`.
            triples: head, relation and tail; of those with an entity and a relation of the training.
            features: as for :meth:`fit`, for some or all of the modalities of the training.
            users: one or several, named as in the data; everybody if None.
            history: instead, the items that a user has who was not in training; then there is no column ``user``.
            k: items per user.

        Raises:
            DataError: for frames that cannot be used, unknown users, and new items of which nothing is known.
            SettingError: for another model, or for users and a history at once.
        """
        trained = self.trained
        if users is not None and history is not None:
            raise SettingError("new items are recommended to users or for a history: name one of them")
        check_model(trained)
        columns = {role: name for role, name in self._about["columns"].items() if role != "user"}
        scorer = NewItemScorer(trained, read_new_items(trained.dataset, items, triples, features, columns))
        if history is not None:
            (ranking,) = scorer.recommend_for([trained.item_ids(_tokens(history))], _positive(k))
            return self._as_given([table(ranking, np.array([""]), scorer.tokens).drop(columns="user")])
        ids = np.arange(1, trained.n_users) if users is None else trained.user_ids(_tokens(users))
        rankings = scorer.recommend(ids, _positive(k))
        return self._as_given([table(ranking, trained.user_tokens, scorer.tokens) for ranking in rankings])

    def similar(self, items: Any, k: int = 10) -> pd.DataFrame:
        """Return the items nearest to each of some items by cosine: item, similar_item, rank from 1, cosine.

        Raises:
            DataError: naming items that are unknown.
            SettingError: if the model has no representations of items.
        """
        ids = self.trained.item_ids(_tokens(items))
        return self._as_given([similar_items(self.trained, int(item), _positive(k)) for item in ids])

    def explain(self, user: Any, item: Any) -> dict[str, Any]:
        """Return why a user gets an item: user, item, score and what ``slifmr recommend --explain`` says.

        Raises:
            DataError: naming a user or item that is unknown.
            SettingError: for a model that has no explanations.
        """
        trained = self.trained
        users, items = trained.user_ids(_tokens(user)), trained.item_ids(_tokens(item))
        if len(users) != 1 or len(items) != 1:
            raise SettingError("explain takes one user and one item")
        if self._explainer is None:
            self._explainer = make_explainer(trained)
        scores = trained.scores(users)[:, items].cpu().numpy()
        reasons = self._explainer.explain(Ranking(users, items[None], scores))[0][0]
        return {"user": user, "item": item, "score": float(scores[0, 0]), **reasons}

    def evaluate(self, test: pd.DataFrame | None = None) -> dict[str, float]:
        """Return the metrics of the setting ``metrics`` at ``topk``.

        Args:
            test: held-out interactions of known users and items; the test split of the training if None. Pairs of the
                training split are left out. What is known of a user apart from these pairs is not ranked.

        Raises:
            DataError: for a frame that cannot be used or has unknown users or items.
            SettingError: for metrics that need more than hits.
        """
        trained = self.trained
        if test is None:
            return dict(self._about["test"])
        tokens = {kind: tokens_of(test, "test", kind, self._about["columns"]) for kind in ("user", "item")}
        users = _rows(trained.user_ids(tokens["user"]), tokens["user"])
        return evaluate(trained, users, _rows(trained.item_ids(tokens["item"]), tokens["item"]))

    def save(self, path: str | Path) -> None:
        """Write a folder with checkpoint and data, whole or not at all; it may take the place of an earlier one.

        Features that the setting ``feature_path`` takes from elsewhere stay there.

        Raises:
            SettingError: if there is something else, or it cannot be written there.
            StorageError: if the disk is full or fails.
        """
        path, name = Path(path), self.trained.config["dataset"]
        if path.exists() and not (path / ABOUT).is_file() and not (path.is_dir() and not any(path.iterdir())):
            raise SettingError(f"{path} is there already and no saved recommender: choose another folder")
        about = {**self._about, "model": self.model, "settings": self.settings}
        try:
            with replace_folder(path) as folder:
                shutil.copyfile(self._checkpoint, folder / CHECKPOINT)
                (folder / DATA / name).mkdir(parents=True)
                for file in self._data.iterdir():
                    if file.is_file():
                        shutil.copyfile(file, folder / DATA / name / file.name)
                write_json(folder / ABOUT, about)
        except OSError as error:
            raise not_written(path, error) from error

    @classmethod
    def load(cls, path: str | Path, model: str | None = None) -> Recommender:
        """Return a recommender that was saved; nothing in the files is run.

        Args:
            path: the folder.
            model: ``package.module:Class`` of a model of your own, which is imported: the files do not choose that.

        Raises:
            SettingError: if the folder is none, a file in it is damaged, or it is of a model of your own and that is
                not named.
            DataError: if its data are not those that the model was trained on.
        """
        try:
            about = json.loads((Path(path) / ABOUT).read_text(encoding="utf-8"))
            saved, settings, name = str(about.pop("model")), dict(about.pop("settings")), about["dataset"]
            kinds = {"columns": dict, "test": dict, "numbers": list}
            if (
                not name
                or name.startswith(".")
                or Path(name).name != name
                or any(not isinstance(about[key], kind) for key, kind in kinds.items())
            ):
                raise ValueError("it does not say what it should")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SettingError(f"{path} is no saved recommender: {ABOUT} in it cannot be read ({error})") from error
        checkpoint = Path(path) / CHECKPOINT
        with _quiet():
            trained = load_trained(checkpoint, Path(path) / DATA, name, model)
        recommender = cls(model or (trained.config["model"] if ":" in saved else saved), **settings)
        recommender._adopt(trained, checkpoint, about)
        return recommender

    def _as_given(self, tables: list[pd.DataFrame]) -> pd.DataFrame:
        """Join tables, with users and items as numbers where the frame of interactions had numbers."""
        joined = pd.concat(tables, ignore_index=True)
        columns = {"user": ["user"], "item": ["item", "similar_item"]}
        numbers = [name for role in self._about["numbers"] for name in columns[role] if name in joined]
        numbers = [name for name in numbers if joined[name].str.fullmatch(r"-?\d+").all()]  # new items: any tokens
        return joined.astype(dict.fromkeys(numbers, "int64"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep messages of RecBole from the screen, and raise those about unknown settings."""
    root, handler = logging.getLogger(), logging.NullHandler()  # without a handler, warnings would go to stderr
    root.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UnknownSettingWarning)
            yield
    except UnknownSettingWarning as warning:
        raise SettingError(str(warning)) from None
    finally:
        root.removeHandler(handler)


def _tokens(values: Any) -> list[str]:
    """Return one or several users or items as tokens."""
    listed = [values] if isinstance(values, (str, int, float, np.generic)) else list(values)
    if not listed:
        raise DataError("no users or items are named")
    return as_tokens(pd.Series(listed), "users or items").tolist()


def _rows(ids: np.ndarray, tokens: pd.Series) -> np.ndarray:
    """Return the id of each token from those of the distinct ones, in the order of their first rows."""
    return ids[pd.factorize(tokens)[0]]


def _positive(k: Any) -> int:
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise SettingError(f"k must be a whole number from 1, not {k!r}")
    return int(k)


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}
