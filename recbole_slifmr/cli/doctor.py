"""``slifmr doctor``: what is installed and whether it works."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

COLOURS = {"ok": "green", "absent": "yellow", "broken": "red"}


@click.command(name="doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a list of checks.")
def doctor_command(as_json: bool) -> None:
    """Say what is installed, what is repaired in RecBole and why, and what is broken; exit status 1 if anything is."""
    from recbole_slifmr.doctor import examine

    checks = examine()
    broken = [check for check in checks if check.state == "broken"]
    if as_json:
        click.echo(json.dumps([check._asdict() for check in checks], indent=1))
    else:
        console = Console()
        for group in dict.fromkeys(check.group for check in checks):
            table = Table("", "", "", title=group, title_justify="left", box=None, show_header=False)
            for check in checks:
                if check.group == group:
                    state = f"[{COLOURS[check.state]}]{check.state}[/]"
                    fix = f": {check.fix}" if check.fix and check.state != "ok" else ""
                    table.add_row(state, check.name, escape(check.found + fix))
            console.print(table)
        for check in broken:
            click.echo(f"broken: {check.name}: {check.found}: {check.fix}", err=True)
    if broken:
        raise SystemExit(1)
    if not as_json:
        click.echo("nothing is broken")
