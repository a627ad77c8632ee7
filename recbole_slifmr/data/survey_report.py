"""What a survey of a data set (``survey.py``) has found, in words, in tables and in files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recbole_slifmr.data.dataset import SLIFMRDataset
from recbole_slifmr.data.survey import degrees
from recbole_slifmr.files import replace_file, write_json


class Section(NamedTuple):
    """A part of the survey as a table: its title, column names and rows."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def remarks(found: Mapping[str, Any]) -> list[str]:
    """Say in a line each what to think about before training."""
    lines = []
    train, n_items = found["counts"]["train"], found["counts"]["all"]["items"]
    for split, counts in found["unseen"].items():
        if counts["pairs_of_training"]:
            lines.append(
                f"{counts['pairs_of_training']} pairs of user and item are in {split} and in training: a model is "
                "asked for what it may not recommend; set rm_dup_inter: first, or make the split anew"
            )
        for who in ("users", "items"):
            share = counts[who] / max(found["counts"][split][who], 1)
            if share > 0.01:
                lines.append(
                    f"{counts[who]} {who} of {split} ({share:.1%}) are not in training: no model learns of them"
                )
    if train["interactions"] < 5 * train["users"]:
        lines.append("fewer than five training interactions per user: expect noisy scores, compare several seeds")
    for file, count in found["duplicates"].items():
        if count:
            effect = "repeated interactions are sampled more often" if file.endswith("inter") else "they count once"
            lines.append(f"{count} rows of .{file} repeat an earlier one: {effect}")
    kg = found["knowledge_graph"]
    if kg:
        for key, effect in (
            ("links_to_unknown_items", "they are left out"),
            ("links_to_unknown_entities", "these items have no knowledge"),
            ("entities_of_several_items", "only the first item of each has its knowledge"),
        ):
            if kg[key]:
                lines.append(f"{kg[key]} {key.replace('_', ' ')}: {effect}")
    without = found["items_without_either"]
    if (kg or found["modalities"]) and without:
        lines.append(
            f"{without} items ({without / n_items:.1%}) have neither an entity nor features: interactions alone"
        )
    for name, count in found["repeated_features"].items():
        n_present = found["modalities"][name]["items"]
        if count and count == n_present - 1:
            lines.append(f"{name}: all {n_present} items have the same features, which tell none from another")
        elif count > 0.01 * n_present:
            lines.append(f"{name}: {count} items ({count / n_present:.1%}) have the features of an earlier item")
    for name, result in found["similarity"].items():
        if result["auc"] is not None and result["auc"] < 0.52:
            lines.append(f"{name}: similar items are not consumed by the same users (AUC {result['auc']:.3f})")
    return lines


def sections(found: Mapping[str, Any]) -> list[Section]:
    """Put what was found into tables."""
    counts, unseen = found["counts"], found["unseen"]
    tables = [
        Section(
            f"{found['dataset']}: sizes",
            ["", *counts],
            [
                *(
                    [name, *(f"{counts[split][name]:,}" for split in counts)]
                    for name in ("users", "items", "interactions")
                ),
                ["density", *(f"{counts[split]['density']:.3%}" for split in counts)],
                *(
                    [label, *(f"{unseen[split][key]:,}" if split in unseen else "" for split in counts)]
                    for key, label in (
                        ("users", "users not in training"),
                        ("items", "items not in training"),
                        ("pairs_of_training", "pairs also in training"),
                    )
                ),
            ],
        ),
        Section(
            "degrees in training",
            ["", "min", "median", "mean", "max", "share of the top 20%"],
            [
                [
                    name,
                    f"{d['min']}",
                    f"{d['median']:g}",
                    f"{d['mean']:.1f}",
                    f"{d['max']:,}",
                    f"{d['share_of_top_fifth']:.1%}",
                ]
                for name, d in found["degrees"].items()
            ],
        ),
        Section("repeated rows", ["file", "rows"], [[f".{name}", f"{n:,}"] for name, n in found["duplicates"].items()]),
    ]
    kg, n_items = found["knowledge_graph"], counts["all"]["items"]
    coverage = [] if kg is None else [["knowledge graph", "", *_share(kg["items_linked"], n_items)]]
    coverage += [[name, str(m["dimension"]), *_share(m["items"], n_items)] for name, m in found["modalities"].items()]
    coverage.append(["none of these", "", *_share(found["items_without_either"], n_items)])
    if kg is not None:
        rows = [[name.replace("_", " "), f"{value:,}"] for name, value in kg.items()]
        tables.append(Section("knowledge graph", ["", "number"], rows))
    tables.append(Section("items covered", ["", "dimension", "items", "share"], coverage))
    if found["similarity"]:
        rows = [
            [name, "" if result["auc"] is None else f"{result['auc']:.3f}", f"{result['pairs']:,}"]
            for name, result in found["similarity"].items()
        ]
        tables.append(Section("similarity of a user's items", ["", "AUC", "pairs"], rows))
    if found["relations"]:
        rows = [
            [row["relation"], row["item_is"], f"{row['tags']:,}", f"{row['items']:,}", f"{row['weight']:.2f}"]
            for row in found["relations"]
        ]
        columns = ["relation", "item is its", "tags", "items", "weight"]
        tables.append(Section("what relations tell of who has the same items", columns, rows))
    memory = found["memory_mb"]
    rows = [[name, f"{value:,.0f}"] for name, value in memory.items()] + [["in all", f"{sum(memory.values()):,.0f}"]]
    tables.append(Section("memory to train", ["", "MB, estimated"], rows))
    return tables


def _share(number: int, of: int) -> list[str]:
    return [f"{number:,}", f"{number / max(of, 1):.1%}"]


def write_survey(found: Mapping[str, Any], train: SLIFMRDataset, out: Path) -> None:
    """Write ``inspect.json``, ``inspect.md`` and ``degrees.png`` into a folder, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "inspect.json", {**found, "remarks": remarks(found)})
    lines = [f"# {found['dataset']}", ""]
    for title, columns, rows in sections(found):
        lines += [
            f"## {title}",
            "",
            *(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)),
            "",
        ]
    lines += [
        "## Remarks",
        "",
        *(f"- {line}" for line in remarks(found) or ["none"]),
        "",
        "![degrees](degrees.png)",
        "",
    ]
    replace_file(out / "inspect.md", lambda part: part.write_text("\n".join(lines), encoding="utf-8"))
    replace_file(out / "degrees.png", lambda part: plot_degrees(part, degrees(train)))


def plot_degrees(path: Path, found: Mapping[str, np.ndarray]) -> None:
    """Draw the share of nodes that have at least so many edges, both axes logarithmic, a line per kind of node."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in found.items():
        degree, count = np.unique(values[values > 0], return_counts=True)
        axes.loglog(degree, count[::-1].cumsum()[::-1] / max(len(values), 1), marker=".", linewidth=1, label=name)
    axes.set(xlabel="degree", ylabel="share of nodes with at least this degree")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150, format="png")
