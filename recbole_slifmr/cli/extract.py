"""``slifmr extract``: item features from texts and images."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from recbole_slifmr.cli.options import FREE_SETTINGS, with_options
from recbole_slifmr.data.dataset import feature_folder_of, item_file_of
from recbole_slifmr.data.extract import CLIP, DIMENSION, Inputs, extract, find_images, read_texts
from recbole_slifmr.data.vectors import ItemFile
from recbole_slifmr.errors import SettingError
from recbole_slifmr.host.settings import make_config, parse_settings


@click.group(name="extract")
def extract_command() -> None:
    """Make item features: slifmr extract text --dataset=ml-100k --fields=movie_title,class."""


OPTIONS = [
    click.option("--dataset", "-d", required=True, help="Folder under data_path."),
    click.option("--batch_size", "--batch-size", default=64, show_default=True, type=click.IntRange(1),
                 help="Items at a time, of a model."),
    click.option("--overwrite", is_flag=True, help="Replace features of the same name."),
]  # fmt: skip


@extract_command.command(context_settings=FREE_SETTINGS)
@with_options(
    *OPTIONS,
    click.option("--fields", "-f", required=True, help="Columns of NAME.item with commas between them: title,genres."),
    click.option("--model", "-m", default=None, help="A sentence-transformers model; TF-IDF if there is none."),
    click.option("--dim", default=None, type=click.IntRange(1), help=f"Dimension, of TF-IDF vectors.  [{DIMENSION}]"),
    click.option("--name", default="text", show_default=True, help="Of the modality and its files."),
)
@click.pass_context
def text(context: click.Context, fields: str, model: str | None, dim: int | None, **options: Any) -> None:
    """Write text features, by TF-IDF or a sentence-transformers model.

    Where the data are is given as settings: --data_path=FOLDER, --feature_path=FOLDER.
    """
    if model is not None and dim is not None:
        raise SettingError("--dim is of TF-IDF vectors: a model has a dimension of its own")
    names = [name.strip() for name in fields.split(",") if name.strip()]
    if not names:
        raise SettingError("--fields names no column")
    make = {"model": model, "dimension": dim or DIMENSION}
    _extract(context.args, lambda item_file: read_texts(item_file, names), make, {"fields": names}, **options)


@extract_command.command(context_settings=FREE_SETTINGS)
@with_options(
    *OPTIONS,
    click.option("--folder", required=True, help="Images named by item token: TOKEN.jpg, TOKEN.png, ..."),
    click.option("--model", "-m", default=CLIP, show_default=True, help="A sentence-transformers model of images."),
    click.option("--name", default="image", show_default=True, help="Of the modality and its files."),
)
@click.pass_context
def image(context: click.Context, folder: str, model: str, **options: Any) -> None:
    """Write image features, by CLIP or another sentence-transformers model of images.

    Where the data are is given as settings: --data_path=FOLDER, --feature_path=FOLDER.
    """
    images, make = Path(folder), {"model": model}
    _extract(context.args, lambda item_file: find_images(images, item_file), make, {"images": folder}, **options)


def _extract(
    arguments: Sequence[str],
    read: Callable[[ItemFile], Inputs],
    make: dict[str, Any],
    card: dict[str, Any],
    dataset: str,
    name: str,
    **options: Any,
) -> None:
    config = make_config("SLIFMR", dataset, settings=parse_settings(arguments))
    folder, inputs = feature_folder_of(config), read(item_file_of(config))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=len(inputs.tokens))
        card = extract(
            folder, name, inputs, **make, **options, **card, dataset=dataset,
            on_batch=lambda done, total: progress.update(task, completed=done),
        )  # fmt: skip
        progress.update(task, completed=len(inputs.tokens))
    path = os.path.relpath(folder / f"{name}.npy")
    click.echo(f"{card['items']} items x {card['dimension']}: {path}, with {name}.ids.txt and {name}.json")
