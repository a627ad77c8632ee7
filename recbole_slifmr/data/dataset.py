"""One data set class for every model: interactions, knowledge graph and item features with the same ids and splits.

RecBole's ``KnowledgeBasedDataset`` deletes the interactions of items without an entity and renumbers the items by
whether they are linked, so that its models see other data than the rest. This one keeps every interaction and numbers
users and items as RecBole's plain ``Dataset`` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.data.dataset import KnowledgeBasedDataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType, ModelType
from torch import Tensor

from recbole_slifmr.data import ml100k
from recbole_slifmr.data.cold import hold_out, is_cold
from recbole_slifmr.data.features import ItemFeatures, find_modalities, load_features
from recbole_slifmr.data.noise import disturb_features, disturb_kg, draw_interactions, drop_interactions, read_noise
from recbole_slifmr.data.split import FILTERS, KG_FILTERS, check_columns, check_split, columns_of_settings, refuse_empty
from recbole_slifmr.data.table import examine, reading_with
from recbole_slifmr.data.vectors import ItemFile
from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.paths import find_feature_folder

# Settings that the data set class reads, for any model.
SETTINGS = ("modalities", "exclude_modalities", "feature_path", "feature_missing", "use_kg", "use_features")
WITHOUT = ("no epoch is better than another, and the last one is tested", "there are no test scores")
CONTENTS = {
    FeatureSource.INTERACTION: "interactions",
    FeatureSource.USER: "users",
    FeatureSource.ITEM: "items",
    FeatureSource.KG: "triples",
    "link": "links",
}


def item_file_of(config: Any) -> ItemFile:
    """Return the ``.item`` file that a configuration means; it may be absent."""
    path = Path(config["data_path"]) / f"{config['dataset']}.item"
    return ItemFile(path, config["ITEM_ID_FIELD"], config["field_separator"], config["seq_separator"])


def feature_folder_of(config: Any) -> Path:
    """Return the folder of the feature files that a configuration means; it may be absent."""
    return find_feature_folder(config["feature_path"], Path(config["data_path"]))


AUTO = "auto"
STEPS, SMALLEST_BATCH = 16, 2048  # of an epoch with train_batch_size: auto


def choose_batch_size(config: Any, n_interactions: int) -> None:
    """Give ``train_batch_size: auto`` its value: so many interactions that an epoch has 16 steps, 2048 at least.

    A model that propagates over whole graphs does so in every step. With a fixed batch, the time of an epoch would grow
    with the square of the interactions.

    Args:
        config: RecBole's configuration; it has the number afterwards.
        n_interactions: of the training split.
    """
    if config["train_batch_size"] == AUTO:
        config["train_batch_size"] = max(n_interactions // STEPS, SMALLEST_BATCH)


class SLIFMRDataset(KnowledgeBasedDataset):
    """Interactions, plus ``.kg`` and ``.link`` and item features if the model reads them and they are there.

    Items keep the ids that RecBole's plain ``Dataset`` gives them. Entity ``i`` is item ``i`` for ``i < item_num``
    (a node of its own for an item without an entity); the other entities follow.

    Args:
        config: RecBole's configuration.

    Attributes:
        item_features: ``{modality: ItemFeatures}``, empty if the model reads none.
        triples: head, relation and tail, ``[T, 3]`` int64; empty if the model reads none or there are none.
        noise: what the setting ``noise`` does to features, triples and, in :meth:`build`, training interactions.

    Raises:
        DataError: naming file, field and fix.
        SettingError: for noise that cannot be had.
    """

    item2entity: dict[str, str]
    entity2item: dict[str, str]
    inter_feat: Any  # a DataFrame, then RecBole's Interaction, as the others are
    kg_feat: Any

    def _get_field_from_config(self) -> None:
        super()._get_field_from_config()
        folder = Path(self.dataset_path)
        check_split(self.config)
        is_kg_model = self.config["MODEL_TYPE"] == ModelType.KNOWLEDGE
        kg, link = (folder / f"{self.dataset_name}.{suffix}" for suffix in ("kg", "link"))
        if is_kg_model and not kg.is_file():
            raise DataError(f"{kg} not found: {self.config['model']} needs a knowledge graph")
        self.has_kg = kg.is_file() and (is_kg_model or bool(self.config["use_kg"]))
        if self.has_kg and not link.is_file():
            raise DataError(f"{link} not found: it should link item tokens to the entities of {kg.name}")
        self.noise = read_noise(self.config)
        if self.noise.of("kg") and not kg.is_file():
            raise SettingError(f"noise: {self.noise.of('kg')[0]} needs a knowledge graph, and there is no {kg}")

    def _get_load_and_unload_col(self, source: Any) -> tuple[set[str] | None, set[str] | None]:
        """Load just what the model reads of ``.kg`` and ``.link``; of ``.inter`` also what other settings work on."""
        if source == FeatureSource.KG:
            return {self.head_entity_field, self.relation_field, self.tail_entity_field}, None
        if source == "link":
            return {self.iid_field, self.entity_field}, None
        load, unload = super()._get_load_and_unload_col(source)
        if source == FeatureSource.INTERACTION and load:
            load |= set(columns_of_settings(self.config))
        return load, unload

    def _load_data(self, token: str, dataset_path: str) -> None:
        if not Path(dataset_path).is_dir():
            raise DataError(
                f"data set '{token}' not found: there is no folder {dataset_path}; set data_path to the folder that "
                f"holds '{token}'"
            )
        parts = [f".{part}" for part in self.benchmark_filename_list] if self.benchmark_filename_list else [""]
        for path in (Path(dataset_path) / f"{token}{part}.inter" for part in parts):
            if not path.is_file():
                raise DataError(f"{path} not found: put the interactions there or check benchmark_filename")
        super()._load_data(token, dataset_path)

    def _load_feat(self, filepath: str, source: Any) -> pd.DataFrame | None:
        if self._get_load_and_unload_col(source)[0] == set() or not Path(filepath).is_file():
            return super()._load_feat(filepath, source)  # nothing to read, or RecBole says which file is missing
        file = examine(Path(filepath), self.config["field_separator"], self.config["encoding"])
        ids = self._id_columns(source)
        for field in ids:
            if field not in file.types:
                raise DataError(f"{filepath} has no column '{field}', only {', '.join(file.types)}")
            if file.types[field] != "token":
                raise DataError(f"{filepath}: column '{field}' must be {field}:token, not {field}:{file.types[field]}")
        if file.n_rows == 0:
            raise DataError(f"{filepath} holds no {CONTENTS.get(source, 'rows')}")
        try:
            with reading_with(self.config, file.encoding):
                frame = super()._load_feat(filepath, source)
        except (ValueError, TypeError) as error:  # pandas' parser errors are ValueErrors
            reason = file.find_bad_number(list(file.types), self.config["seq_separator"])
            raise DataError(reason or f"{filepath} cannot be read: {' '.join(str(error).split())}") from error
        if frame is None:
            raise DataError(f"{filepath}: load_col names none of its columns {', '.join(file.types)}")
        file.check_ids(frame, [field for field in ids if field in frame])
        file.check_numbers(frame, may_be_missing=source != FeatureSource.INTERACTION)
        if source in (FeatureSource.USER, FeatureSource.ITEM, "link"):
            file.check_unique(frame, ids[0])
        return frame

    def _id_columns(self, source: Any) -> tuple[str, ...]:
        """Return the columns of a file that no row can do without."""
        by_source = {
            FeatureSource.INTERACTION: (self.uid_field, self.iid_field),
            FeatureSource.USER: (self.uid_field,),
            FeatureSource.ITEM: (self.iid_field,),
            FeatureSource.KG: (self.head_entity_field, self.relation_field, self.tail_entity_field),
            "link": (self.iid_field, self.entity_field),
        }
        return by_source.get(source, ())

    def _load_kg(self, token: str, dataset_path: str) -> pd.DataFrame:
        if self.has_kg:
            return super()._load_kg(token, dataset_path)
        fields = (self.head_entity_field, self.relation_field, self.tail_entity_field)
        for field in fields:
            self.set_field_property(field, FeatureType.TOKEN, FeatureSource.KG, 1)
        return pd.DataFrame({field: pd.Series(dtype=str) for field in fields})

    def _load_link(self, token: str, dataset_path: str) -> tuple[dict[str, str], dict[str, str]]:
        return super()._load_link(token, dataset_path) if self.has_kg else ({}, {})

    def _build_feat_name_list(self) -> list[str]:
        names = super()._build_feat_name_list()
        if not self.has_kg:
            names.remove("kg_feat")  # RecBole refuses an empty one
        return names

    def _remove_duplication(self) -> None:
        """Sort by time first, ties in the order of the file; RecBole's sort leaves ties in any order."""
        keep = self.config["rm_dup_inter"]
        if keep is not None and self.time_field in self.inter_feat:
            ordered = self.inter_feat.sort_values(self.time_field, kind="stable")
            self.inter_feat = ordered.drop_duplicates([self.uid_field, self.iid_field], keep=keep)
        else:
            super()._remove_duplication()

    def _parse_intervals_str(self, intervals_str: Any) -> Any:
        """Refuse what is no interval; RecBole leaves it out, and nothing is filtered."""
        try:
            parsed = super()._parse_intervals_str(intervals_str)
        except (ValueError, IndexError):
            parsed = []
        if parsed is not None and len(parsed) <= str(intervals_str).count(";"):
            raise SettingError(f"'{intervals_str}' is no interval: write it as [5,inf) or [1,2];(4,5]")
        return parsed

    def _reset_index(self) -> None:
        for name in self.feat_name_list:
            if getattr(self, name).empty:
                refuse_empty(self, name.removesuffix("_feat"), FILTERS)
        super()._reset_index()

    def _filter_kg_by_triple_num(self) -> None:
        if not self.has_kg:
            return
        super()._filter_kg_by_triple_num()
        if self.kg_feat.empty:
            refuse_empty(self, "kg", KG_FILTERS)

    def _filter_link(self) -> None:
        """Keep every interaction; stray links are pruned in :meth:`_merge_item_and_entity`."""

    def _merge_item_and_entity(self) -> None:
        """Give linked entities the id of their item, the others ids after the items; items keep theirs."""
        item_ids = self.field2token_id[self.iid_field]
        entities = self.field2id_token[self.head_entity_field]
        known = set(entities[1:])
        n_links = len(self.item2entity)
        kept = {item: entity for item, entity in self.item2entity.items() if item in item_ids and entity in known}
        self.entity2item = {entity: item for item, entity in reversed(kept.items())}  # the first item of each entity
        self.item2entity = {item: entity for entity, item in self.entity2item.items()}
        if n_links and not self.item2entity:
            raise DataError(
                f"{Path(self.dataset_path) / self.dataset_name}.link: none of its {n_links} links joins an item of the "
                "interactions with an entity of the .kg file: check the tokens"
            )
        if n_links > len(self.item2entity):
            self.logger.info(
                f"{n_links} links: {n_links - len(kept)} lead to an unknown item or entity, "
                f"{len(kept) - len(self.item2entity)} to an entity that another item has; both are left out"
            )
        linked = pd.Series(entities).map(self.entity2item).map(item_ids)
        free = linked.isna().to_numpy()
        free[0] = False
        n_items = len(item_ids)
        new_ids = np.zeros(len(entities), dtype=np.int64)
        new_ids[~free] = linked[~free].fillna(0)
        new_ids[free] = np.arange(n_items, n_items + free.sum())
        tokens = self.field2id_token[self.iid_field].astype(object)
        for entity, item in self.entity2item.items():
            tokens[item_ids[item]] = entity
        tokens = np.concatenate([tokens, entities[free]]).astype(str)
        token_ids = {entity: i for i, entity in enumerate(tokens)}
        for field in self.alias["entity_id"]:
            self._reset_ent_remapID(field, new_ids, tokens, token_ids)
        self.field2id_token[self.entity_field] = tokens
        self.field2token_id[self.entity_field] = token_ids

    def _add_auxiliary_relation(self) -> None:
        """Add the noise first, so that it goes into the reverse triples too."""
        if self.has_kg and self.noise.of("kg"):
            self._disturb_kg()
        super()._add_auxiliary_relation()

    def _disturb_kg(self) -> None:
        fields = [self.head_entity_field, self.relation_field, self.tail_entity_field]
        item_ids, tokens = self.field2token_id[self.iid_field], self.field2id_token[self.entity_field]
        linked = np.array([item_ids[item] for item in self.item2entity])
        triples, ids = disturb_kg(self.noise, self.kg_feat[fields].to_numpy(np.int64), linked, len(tokens))
        self.kg_feat = pd.DataFrame(triples, columns=fields)
        moved = tokens.copy()
        moved[ids] = tokens
        token_ids = {entity: i for i, entity in enumerate(moved)}
        for field in (self.head_entity_field, self.tail_entity_field, self.entity_field):
            self.field2id_token[field], self.field2token_id[field] = moved, token_ids
        self.item2entity = {item: moved[item_ids[item]] for item in self.item2entity}
        self.entity2item = {entity: item for item, entity in self.item2entity.items()}

    def _data_processing(self) -> None:
        check_columns(self)
        super()._data_processing()
        fields = [self.head_entity_field, self.relation_field, self.tail_entity_field]
        self.triples: Tensor = torch.from_numpy(self.kg_feat[fields].to_numpy(np.int64))
        self.item_features: dict[str, ItemFeatures] = self._load_item_features() if self.config["use_features"] else {}
        for line in self._describe_inputs():
            self.logger.info(line)

    def _load_item_features(self) -> dict[str, ItemFeatures]:
        item_file, folder = item_file_of(self.config), feature_folder_of(self.config)
        modalities = self.config["modalities"]
        if self.dataset_name == "ml-100k" and isinstance(modalities, dict) and ml100k.SOURCE in modalities.values():
            ml100k.ensure_text_features(item_file, folder)
        if not folder.is_dir():
            raise DataError(f"feature_path: there is no folder {folder}")
        if modalities == "auto":
            modalities = find_modalities(folder)
        if not isinstance(modalities or {}, dict):
            raise DataError(f"modalities must be 'auto' or a mapping of name to file, not {modalities!r}")
        modalities = dict(modalities or {})
        for name in self.config["exclude_modalities"] or []:
            if name not in modalities:
                raise DataError(f"exclude_modalities: there is no modality '{name}', only {', '.join(modalities)}")
            del modalities[name]
        missing = self.config["feature_missing"] or "mask"
        features = load_features(modalities, folder, item_file, self.field2token_id[self.iid_field], missing)
        kinds = self.noise.of("feature")
        if kinds and not features:
            raise SettingError(f"noise: {kinds[0]} needs item features, and '{self.dataset_name}' has none in {folder}")
        return disturb_features(self.noise, features) if kinds else features

    def _describe_inputs(self) -> list[str]:
        """Say what there is beside the interactions."""
        lines = []
        if self.has_kg:
            n_items = self.item_num - 1
            n_linked, n_relations = len(self.item2entity), len(torch.unique(self.triples[:, 1]))
            lines.append(
                f"knowledge graph: {len(self.triples)} triples, {n_relations} relations, "
                f"{len(torch.unique(self.triples[:, [0, 2]]))} entities, {n_linked} of {n_items} items linked "
                f"({n_linked / n_items:.1%})"
            )
        if self.noise.levels:
            lines.append(f"noise: {self.noise}")
        return lines

    def _describe_unknown(self, train: SLIFMRDataset) -> str:
        """Say how many cold items have neither features nor triples, if the model reads either."""
        if not self.item_features and not len(self.triples):
            return ""
        known = torch.zeros(self.item_num, dtype=torch.bool)
        known[self.triples[:, [0, 2]][self.triples[:, [0, 2]] < self.item_num]] = True
        for features in self.item_features.values():
            known |= features.mask
        cold = is_cold(train)
        n_unknown = int((cold & ~known).sum())
        return f"; {n_unknown} of the {int(cold.sum())} items without training interactions have nothing else either"

    def build(self) -> list[SLIFMRDataset]:
        """Split the data set, see RecBole's ``Dataset.build``; hold out cold items, add noise to the training part.

        ``cold_items`` are drawn with the seed of the split.

        Raises:
            DataError: if the training split is empty.
            SettingError: for a share of cold items out of range, or noise that cannot be had.
        """
        parts = super().build()
        share = self.config["cold_items"]
        if share:
            if "interaction_add" in self.noise.levels:
                raise SettingError(
                    "noise: interaction_add would reach the items that cold_items holds out: leave one out"
                )
            self.logger.info(hold_out(parts, share, torch.initial_seed()) + self._describe_unknown(parts[0]))
        if len(parts[0].inter_feat) == 0:
            raise DataError(f"the training split of '{self.dataset_name}' is empty: check eval_args and the files")
        for part, kind, effect in zip(parts[1:], ("validation", "testing"), WITHOUT, strict=True):
            if len(part.inter_feat) == 0:
                self.logger.warning(f"no interactions of '{self.dataset_name}' are left for {kind}: {effect}")
        if self.noise.of("interaction"):
            parts[0].inter_feat = self._disturb_interactions(parts)
        return parts

    def _dataframe_to_interaction(self, data: pd.DataFrame) -> Any:
        """Keep times as float64: as float32, RecBole's choice, seconds since 1970 tie over a minute."""
        interaction = super()._dataframe_to_interaction(data)
        if self.time_field in interaction and data[self.time_field].dtype == np.float64:
            interaction[self.time_field] = torch.from_numpy(data[self.time_field].to_numpy(copy=True))
        return interaction

    def _disturb_interactions(self, parts: list[SLIFMRDataset]) -> Any:
        """Return the training interactions with noise."""
        clean = parts[0].inter_feat
        kept = np.ones(len(clean), dtype=bool)
        users = items = donors = np.zeros(0, dtype=np.int64)
        if "interaction_drop" in self.noise.levels:
            kept = drop_interactions(self.noise, clean[self.uid_field].numpy(), clean[self.iid_field].numpy())
        if "interaction_add" in self.noise.levels:
            known_users, known_items = (
                torch.cat([part.inter_feat[field] for part in parts]).numpy()
                for field in (self.uid_field, self.iid_field)
            )
            users, items, donors = draw_interactions(
                self.noise, len(clean), known_users, known_items, self.user_num, self.item_num
            )
        rows = torch.from_numpy(np.concatenate([kept.nonzero()[0], donors]))
        columns = {name: clean[name][rows] for name in clean}
        for field, ids in ((self.uid_field, users), (self.iid_field, items)):
            columns[field][len(rows) - len(ids) :] = torch.from_numpy(ids)
        return Interaction(columns)
