"""``slifmr export``: representations as files."""

from __future__ import annotations

from pathlib import Path

import click

from recbole_slifmr.cli.options import with_options
from recbole_slifmr.cli.recommend import TRAINED_OPTIONS


@click.command(name="export", context_settings={"help_option_names": ["-h", "--help"]})
@with_options(
    *TRAINED_OPTIONS,
    click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the files."),
    click.option("--n_weights", "--n-weights", default=200, show_default=True, type=click.IntRange(min=1),
                 help="Weights per item, of a closed form."),
    click.option("--faiss", is_flag=True, help="Write a FAISS index of the items too (extra 'ann')."),
)  # fmt: skip
def export_command(
    checkpoint: Path,
    data_path: str | None,
    dataset: str | None,
    model: str | None,
    out: Path,
    n_weights: int,
    faiss: bool,
) -> None:
    """Export users and items: slifmr export --checkpoint=saved/SLIFMR-....pth --out=vectors.

    The inner product of a row of users.npy and one of items.npy is the model's score; users.txt and items.txt name
    the rows. Of a closed form, weights.npz has the largest weights of each item, a column, on the others, rows.
    """
    from recbole_slifmr.serve.export import export
    from recbole_slifmr.serve.trained import load_trained

    for file in export(load_trained(checkpoint, data_path, dataset, model), out, faiss, n_weights):
        click.echo(file)
