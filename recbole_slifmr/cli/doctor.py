"""``slifmr doctor``: what is installed and whether it works."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from recbole_slifmr.doctor import Check

IN_FULL = "machine"  # the group whose every line is of interest
COLOURS = {"ok": "green", "absent": "yellow", "broken": "red"}


@click.command(name="doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a list of checks.")
@click.option("--verbose", is_flag=True, help="A line for each check, also for what is as it should be.")
def doctor_command(as_json: bool, verbose: bool) -> None:
    """Say what is installed, what is repaired in RecBole and why, and what is broken; exit status 1 if anything is.

    Of packages, repairs, folders and files the count is shown, and those that are absent or broken.
    """
    from recbole_slifmr.doctor import examine

    checks = examine()
    broken = [check for check in checks if check.state == "broken"]
    if as_json:
        click.echo(json.dumps([check._asdict() for check in checks], indent=1))
    else:
        console = Console()
        for group in dict.fromkeys(check.group for check in checks):
            found = [check for check in checks if check.group == group]
            _print_group(console, group, found, verbose or group == IN_FULL)
        for check in broken:
            click.echo(f"broken: {check.name}: {check.found}: {check.fix}", err=True)
    if broken:
        raise SystemExit(1)
    if not as_json:
        click.echo("nothing is broken")


def _print_group(console: Console, group: str, checks: Sequence[Check], in_full: bool) -> None:
    table = Table("", "", "", title=group, title_justify="left", box=None, show_header=False)
    shown = [check for check in checks if in_full or check.state != "ok"]
    if not in_full:
        table.title = f"{group}: {sum(check.state == 'ok' for check in checks)} of {len(checks)} ok"
    for check in shown:
        fix = f": {check.fix}" if check.fix and check.state != "ok" else ""
        table.add_row(f"[{COLOURS[check.state]}]{check.state}[/]", check.name, escape(check.found + fix))
    if shown:
        console.print(table)
    else:
        console.print(f"[italic]{table.title}[/]", highlight=False)
