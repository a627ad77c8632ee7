"""``slifmr report``: one page from the outputs of benchmarks, studies and searches."""

from __future__ import annotations

import os

import click


@click.command(name="report")
@click.argument("folders", nargs=-1, required=True, metavar="DIR...")
@click.option("--out", default="report.html", show_default=True, help="File of the page.")
def report_command(folders: tuple[str, ...], out: str) -> None:
    """Write one HTML page from output folders: slifmr report benchmark tune --out=report.html.

    Tables, plots, settings and how it was made are all in the page, which needs no network.
    """
    from recbole_slifmr.study.page import write_page

    click.echo(f"report: {os.path.relpath(write_page(folders, out))}")
