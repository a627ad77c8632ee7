"""What the settings of filters and splits ask of the columns, checked before RecBole works on them.

RecBole's ``order: TO`` and its split at one moment for all users (``TS``) sort by ``TIME_FIELD``; ``val_interval`` and
``threshold`` work on the columns that they name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recbole.utils import FeatureType

from recbole_slifmr.errors import DataError, SettingError

WHOLE_NUMBERS = 2**53  # up to here float64 tells whole numbers apart
ANY_NUMBER = "[0,inf)"
FILTERS = ("val_interval", "user_inter_num_interval", "item_inter_num_interval")
KG_FILTERS = ("entity_kg_num_interval", "relation_kg_num_interval")


def columns_of_settings(config: Any) -> dict[str, str]:
    """Return the columns that settings work on, each with what works on it.

    Without ``threshold`` there are none for a fixed split (``benchmark_filename``), which RecBole neither filters nor
    sorts.
    """
    columns = {field: "threshold" for field in config["threshold"] or {}}
    if config["benchmark_filename"]:
        return columns
    columns |= {field: "val_interval" for field in config["val_interval"] or {}}
    if sorts_by_time(config):
        columns[config["TIME_FIELD"]] = "eval_args: order TO"
    return columns


def sorts_by_time(config: Any) -> bool:
    """Return whether RecBole sorts the interactions by time before it splits them."""
    return not config["benchmark_filename"] and config["eval_args"]["order"] == "TO"


def check_split(config: Any) -> None:
    """Refuse a split that RecBole would fail at, or make otherwise than its name says.

    With ``order: RO``, RecBole's split by time (``TS``) takes the places of sorted rows for those of unsorted ones.

    Raises:
        SettingError: naming what to write.
    """
    split = config["eval_args"]["split"]
    if config["benchmark_filename"] or not isinstance(split, Mapping):
        return
    for kind in {"RS", "TS"} & set(split):
        shares = split[kind]
        numbers = isinstance(shares, list) and all(isinstance(s, (int, float)) and s >= 0 for s in shares)
        if not numbers or len(shares) != 3 or sum(shares) == 0:
            raise SettingError(
                f"eval_args: split {kind} must be three shares, of training, validation and test, such as "
                f"[0.8, 0.1, 0.1], not {shares!r}"
            )
    if "TS" in split and config["eval_args"]["order"] != "TO":
        raise SettingError("eval_args: split TS is a split by time: add order: TO")


def check_columns(data: Any) -> None:
    """Check that the columns that settings work on have been loaded.

    Args:
        data: the data set, its files read.

    Raises:
        DataError: naming the column, the setting and what to load.
    """
    path = f"{data.dataset_path}/{data.dataset_name}.inter"
    for field, setting in columns_of_settings(data.config).items():
        if field not in (data.field2type if setting == "val_interval" else data.inter_feat):
            raise DataError(
                f"{setting} needs the column '{field}', which neither {path} nor another file that is loaded has: "
                "check its name, load_col and unload_col"
            )
    if not sorts_by_time(data.config):
        return
    field = data.time_field
    if data.field2type[field] != FeatureType.FLOAT:
        raise DataError(
            f"{path}: '{field}' must be {field}:float to sort by it, not {field}:{data.field2type[field].value}"
        )
    if data.inter_feat[field].abs().max() > WHOLE_NUMBERS:
        raise DataError(
            f"{path}: '{field}' has numbers above 2^53, which cannot be told apart: give microseconds instead of "
            "nanoseconds"
        )


def refuse_empty(data: Any, suffix: str, filters: Sequence[str]) -> None:
    """Say which of the filters have left nothing of a file.

    Raises:
        DataError: with the settings that are not at their defaults.
    """
    config = data.config
    used = [f"{name}: {config[name]}" for name in filters if config[name] and config[name] != ANY_NUMBER]
    fix = f"widen {', '.join(used)}" if used else "its users or items are not in .user or .item, which load_col names"
    raise DataError(f"{data.dataset_path}/{data.dataset_name}.{suffix}: nothing of it is left after filtering; {fix}")
