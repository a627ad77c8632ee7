"""``slifmr convert``: other layouts of data sets to RecBole's atomic files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from recbole_slifmr.cli.options import parse_files, with_options
from recbole_slifmr.data.convert import Columns, Summary, convert_kgat, convert_mmrec, convert_tables
from recbole_slifmr.data.convert.kgat import Track
from recbole_slifmr.data.convert.source import Open
from recbole_slifmr.errors import SettingError

FOLDER = click.Path(path_type=Path)
TARGET = [
    click.option("--out", default="dataset", show_default=True, type=FOLDER, help="Folder of data sets to write into."),
    click.option("--name", default=None, help="Of the data set.  [that of the source]"),
    click.option("--force", is_flag=True, help="Replace a data set of that name, all of its files."),
]


@contextmanager
def _progress() -> Iterator[tuple[Open, Track]]:
    """Give ways to open files and to pass blocks on that show on stderr how far they are."""
    with Progress(console=Console(stderr=True)) as progress:

        def open_file(path: Path) -> BinaryIO:
            return cast(BinaryIO, progress.open(path, "rb", description=f"read {path.name}"))

        def track(blocks: Iterable[int], label: str) -> Iterable[int]:
            return progress.track(blocks, description=label)

        yield open_file, track


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """Print what a converted data set holds and the command that trains on it."""
    console = console or Console()
    table = Table(title=summary.folder.name, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    splits = " / ".join(f"{n:,}" for n in summary.n_interactions.values())
    total = sum(summary.n_interactions.values())
    table.add_row("users", f"{summary.n_users:,}")
    table.add_row("items", f"{summary.n_items:,}")
    table.add_row("interactions", f"{total:,}" + (f" ({splits})" if len(summary.n_interactions) > 1 else ""))
    table.add_row("density", f"{summary.density:.3%}")
    if summary.n_triples:
        table.add_row("entities", f"{summary.n_entities:,}")
        table.add_row("relations", f"{summary.n_relations:,}")
        table.add_row("triples", f"{summary.n_triples:,}")
        table.add_row("linked items", f"{summary.n_linked:,} ({summary.n_linked / summary.n_items:.1%})")
    for name, (dimension, n_covered) in summary.covered.items():
        table.add_row(f"{name} ({dimension})", f"{n_covered:,} items ({n_covered / summary.n_items:.1%})")
    console.print(table)
    for note in summary.notes:
        click.echo(note)
    click.echo(summary.command)


@click.group()
def convert() -> None:
    """Turn a data set in another layout into RecBole's atomic files: slifmr convert kgat amazon-book."""


@convert.command()
@click.argument("source", metavar="DIR", type=FOLDER)
@with_options(*TARGET)
def mmrec(source: Path, **options: Any) -> None:
    """MMRec: NAME.inter with userID, itemID and x_label, image_feat.npy, text_feat.npy, i_id_mapping.csv."""
    with _progress() as (open_file, _):
        summary = convert_mmrec(source, open_file=open_file, **options)
    print_summary(summary)


@convert.command()
@click.argument("source", metavar="DIR", type=FOLDER)
@with_options(*TARGET)
@click.option("--seed", default=2020, show_default=True, help="Of the validation split, drawn out of training.")
def kgat(source: Path, **options: Any) -> None:
    """KGAT: train.txt, test.txt, kg_final.txt and lists of names, as of amazon-book, yelp2018 and last-fm."""
    with _progress() as (open_file, track):
        summary = convert_kgat(source, open_file=open_file, track=track, **options)
    print_summary(summary)


def _parse_separator(text: str | None) -> str | None:
    separator = {"\\t": "\t", "tab": "\t", "space": " "}.get(text or "", text)
    if separator is not None and len(separator) != 1:
        raise SettingError(f"--separator must be one character, \\t, tab or space, not '{text}'")
    return separator


@convert.command("csv")
@with_options(
    click.option("--interactions", required=True, type=FOLDER, help="A row per interaction of a user with an item."),
    click.option("--items", default=None, type=FOLDER, help="A row per item and what is known about it."),
    click.option("--triples", default=None, type=FOLDER, help="Head, relation and tail."),
    click.option("--links", default=None, type=FOLDER, help="Item and entity.  [entities that have an item's token]"),
    click.option("--features", multiple=True, help="image=F.npy,text=F.parquet: see docs/data.md."),
    *[
        click.option(f"--{name}_column", f"--{name}-column", f"{name}_column", default=default, show_default=True)
        for name, default in vars(Columns()).items()
    ],
    click.option("--separator", default=None, help="Between the values of all files.  [as the first line suggests]"),
    *TARGET,
)
def tables(features: tuple[str, ...], separator: str | None, **options: Any) -> None:
    """Convert delimited files whose first line names the columns."""
    columns = Columns(**{name: options.pop(f"{name}_column") for name in vars(Columns())})
    modalities, separator = parse_files(features, "--features"), _parse_separator(separator)
    with _progress() as (open_file, _):
        summary = convert_tables(
            features=modalities, separator=separator, columns=columns, open_file=open_file, **options
        )
    print_summary(summary)
