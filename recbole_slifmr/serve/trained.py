"""A trained model: from a checkpoint to the model, its data and the tokens of users and items."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import recbole
import recbole.data.dataset
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import get_model, init_seed
from torch import Tensor

from recbole_slifmr.data.history import History
from recbole_slifmr.errors import DataError, SettingError, name_some
from recbole_slifmr.host import own
from recbole_slifmr.host.settings import bad_input, model_names
from recbole_slifmr.model.fused import FusedRecommender
from recbole_slifmr.nn.linear_branch import LinearBranch
from recbole_slifmr.paths import find_data_path
from recbole_slifmr.training.checkpoint import check_data, read_checkpoint
from recbole_slifmr.training.experiment import set_threads

CHECKED = 64  # users whose scores are compared with inner products


@dataclass(frozen=True)
class Trained:
    """A trained model and its data.

    Attributes:
        config: the settings it was trained with.
        model: in evaluation mode.
        dataset: the training split.
        seen: the interactions of all splits.
    """

    config: Any
    model: Any
    dataset: Any
    seen: History

    @property
    def n_users(self) -> int:
        """Number of users, the padding user 0 included."""
        return self.dataset.user_num

    @property
    def n_items(self) -> int:
        """Number of items, the padding item 0 included."""
        return self.dataset.item_num

    @property
    def user_tokens(self) -> np.ndarray:
        """The token of each user id, ``[n_users]``."""
        return self.dataset.field2id_token[self.dataset.uid_field]

    @property
    def item_tokens(self) -> np.ndarray:
        """The token of each item id, ``[n_items]``."""
        return self.dataset.field2id_token[self.dataset.iid_field]

    def user_ids(self, tokens: Sequence[str]) -> np.ndarray:
        """Return the ids of users, each once, in the order given.

        Raises:
            DataError: naming the tokens that are unknown.
        """
        return self._ids(tokens, self.dataset.uid_field, "user")

    def item_ids(self, tokens: Sequence[str]) -> np.ndarray:
        """Return the ids of items, see :meth:`user_ids`."""
        return self._ids(tokens, self.dataset.iid_field, "item")

    def _ids(self, tokens: Sequence[str], field: str, kind: str) -> np.ndarray:
        known = self.dataset.field2token_id[field]
        unknown = [token for token in dict.fromkeys(tokens) if not known.get(token)]  # 0: padding
        if unknown:
            raise DataError(
                f"unknown {kind}{'s' if len(unknown) > 1 else ''} {name_some(unknown)}: '{self.config['dataset']}' has "
                f"{len(known) - 1} {kind}s, each named as in {self.dataset.dataset_path}"
            )
        return np.array([known[token] for token in dict.fromkeys(tokens)], dtype=np.int64)

    @torch.no_grad()
    def scores(self, users: np.ndarray) -> Tensor:
        """Return the scores of all items for ``users [n]``, ``[n, n_items]``: those of ``full_sort_predict``."""
        ids = Interaction({self.dataset.uid_field: torch.from_numpy(users)})
        return self.model.full_sort_predict(ids.to(self.config["device"])).view(len(users), -1)

    @torch.no_grad()
    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Return users ``[n_users, d]`` and items ``[n_items, d]`` whose inner products are the scores.

        Of a SLIFMR with a linear branch, they are what it adds to the scores of the branch. Whatever else the model
        is: embeddings are looked for where RecBole's models have them, and compared with its scores.

        Raises:
            SettingError: if the model has none.
        """
        sample = np.unique(np.linspace(1, self.n_users - 1, CHECKED).astype(np.int64))
        expected = self.scores(sample)
        if self.linear_branch is not None:
            expected = expected - self.linear_branch.scores(torch.from_numpy(sample).to(expected.device))
        for users, items in self._candidates():
            found = isinstance(users, Tensor) and isinstance(items, Tensor) and users.dim() == items.dim() == 2
            if not found or len(users) != self.n_users or users.shape[1] != items.shape[1]:
                continue
            items = items[: self.n_items]  # entities follow the items
            product = users[torch.from_numpy(sample).to(users.device)] @ items.T
            if product.shape == expected.shape and torch.allclose(product[:, 1:], expected[:, 1:], 1e-3, 1e-4):
                return users, items
        raise SettingError(
            f"{self.config['model']} has no representations of users and items whose inner products are its scores"
        )

    def item_vectors(self) -> Tensor:
        """Return what items are compared by, ``[n_items, d]``: their embeddings.

        Raises:
            SettingError: if the model has none.
        """
        return self.embeddings()[1]

    @property
    def linear_branch(self) -> LinearBranch | None:
        """What a model of several views adds to the inner products of its embeddings; None without a branch."""
        return self.model.linear if isinstance(self.model, FusedRecommender) else None

    def _candidates(self) -> Iterator[tuple[Any, Any]]:
        model = self.model
        for name in ("restore_item_e", "restore_entity_e"):
            yield getattr(model, "restore_user_e", None), getattr(model, name, None)
        try:
            users, items, *_ = model()
            yield users, items
        except TypeError:  # its forward takes arguments
            pass
        tables = (getattr(model, f"{kind}_embedding", None) for kind in ("user", "item"))
        users, items = (getattr(table, "weight", None) for table in tables)
        yield users, items


def load_trained(
    checkpoint: str | Path,
    data_path: str | Path | None = None,
    dataset: str | None = None,
    model: str | None = None,
) -> Trained:
    """Build a trained model and its data from a checkpoint; no setting in it is evaluated.

    Args:
        checkpoint: of a model of this package, of RecBole's general or knowledge-aware ones, or of one of your own.
        data_path: the folder that holds the data set's folder, if it is not where it was.
        dataset: the data set's name, if it is not what it was.
        model: ``package.module:Class`` of a model of your own, which is imported; what the checkpoint says of it is
            not, unless this process was given that name before.

    Raises:
        SettingError: if the file is no such checkpoint, the model cannot rank all items, or it is one of your own and
            is not named.
        DataError: if the data cannot be used or are not those that the model was trained on.
    """
    state = read_checkpoint(checkpoint)
    settings = state["config"].final_config_dict
    name = settings["model"]
    _check_own(checkpoint, settings, model)
    if name not in model_names():
        raise SettingError(
            f"{checkpoint} is of '{name}', no model of this package nor a general or knowledge-aware one of RecBole"
        )
    if get_model(name).full_sort_predict is AbstractRecommender.full_sort_predict:
        raise SettingError(f"{name} has no full_sort_predict: it scores single pairs and ranks no users' items")
    with bad_input(SettingError):
        config = _settings_here(state["config"], _data_folder(settings, data_path, dataset))
        set_threads(config)
    with bad_input(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="recbole")  # of pandas, on every column
        record = state.get("data") or {}
        init_seed(record.get("split_seed", config["seed"]), config["reproducibility"])
        kind = getattr(recbole.data.dataset, f"{name}Dataset")  # not create_dataset: it unpickles files
        train, *held_out = kind(config).build()
    check_data(checkpoint, state, train)
    model = _load_model(checkpoint, state, config, train)
    fields = (train.uid_field, train.iid_field)
    users, items = (np.concatenate([part.inter_feat[f].numpy() for part in (train, *held_out)]) for f in fields)
    return Trained(config, model, train, History.of(users, items, train.user_num, train.item_num))


def _check_own(checkpoint: str | Path, settings: dict[str, Any], model: str | None) -> None:
    """Import the model that the user names; refuse a checkpoint of another, or of an own model that nobody names."""
    name, stored = settings["model"], settings.get("own_model")
    if model is not None:
        if own.name_of(model) != name:
            raise SettingError(f"{checkpoint} is of '{name}', not of '{model}'")
        if ":" in model:
            own.use(model)
    elif isinstance(stored, str) and own.NAME.fullmatch(stored) and own.used().get(name) != stored:
        raise SettingError(
            f"{checkpoint} is of {stored}, a model of somebody's own, and no file chooses what is imported: if you "
            f"know that model, name it with --model={stored}, in Python model='{stored}'"
        )


def _data_folder(settings: dict[str, Any], data_path: str | Path | None, dataset: str | None) -> Path:
    name = dataset or settings["dataset"]
    if data_path is not None:
        return Path(data_path) / name
    if name == "ml-100k":  # as RecBole does
        return Path(recbole.__file__).parent / "dataset_example" / name
    return Path(find_data_path(name, str(Path(settings["data_path"]).parent))) / name


def _settings_here(stored: Config, folder: Path) -> Config:
    """Copy the settings of a checkpoint, with the data and the device that are here."""
    config = copy.copy(stored)
    cuda = torch.cuda.is_available() and torch.device(stored["device"] or "cpu").type == "cuda"
    here = {
        "data_path": str(folder),
        "dataset": folder.name,
        "device": torch.device("cuda" if cuda else "cpu"),
        "MODEL_TYPE": get_model(stored["model"]).type,
    }
    vars(config)["final_config_dict"] = {**stored.final_config_dict, **here}
    return config


def _load_model(checkpoint: str | Path, state: dict[str, Any], config: Config, train: Any) -> Any:
    name = config["model"]
    with bad_input(SettingError, (ValueError, NotImplementedError, TypeError)):
        init_seed(config["seed"], config["reproducibility"])
        model = get_model(name)(config, train).to(config["device"])
    try:
        foreign = set(state.get("other_parameter") or {}) - set(model.other_parameter())
        if foreign:
            raise KeyError(f"unknown {', '.join(sorted(foreign))}")
        model.load_state_dict(state["state_dict"])
        model.load_other_parameter(_on(config["device"], state.get("other_parameter")))
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SettingError(f"{checkpoint} does not fit {name} on {train.dataset_path}: {reason}") from error
    return model.eval()


def _on(device: torch.device, held: Any) -> Any:
    """Move the tensors of a mapping to a device."""
    return held and {name: value.to(device) if isinstance(value, Tensor) else value for name, value in held.items()}
