"""``slifmr serve``: a page on which to look at what a trained model recommends."""

from __future__ import annotations

import importlib.util
import ipaddress
from pathlib import Path
from urllib.parse import quote

import click

from recbole_slifmr.cli.options import split_names, with_options
from recbole_slifmr.cli.recommend import TRAINED_OPTIONS
from recbole_slifmr.errors import SettingError

LOOPBACK = ["localhost", "127.0.0.1", "[::1]"]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@with_options(
    *TRAINED_OPTIONS,
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on: this machine alone."),
    click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any that is free."),
    click.option("--show", default=None, help="Columns of the .item file, the title first.  [its title]"),
    click.option("--images", default=None, type=click.Path(path_type=Path), help="Folder of files such as ITEM.jpg."),
    click.option("--image_field", "--image-field", default=None, help="Column of https addresses of images instead."),
    click.option("--explain/--no-explain", default=True, help="Be ready to say why.  [explain]"),
    click.option("--timeout", default=10.0, show_default=True, type=click.FloatRange(min=0.001),
                 help="Seconds after which a question is given up."),
)  # fmt: skip
def serve(
    checkpoint: Path, data_path: str | None, dataset: str | None, model: str | None, host: str, port: int,
    show: str | None, images: Path | None, image_field: str | None, explain: bool, timeout: float,
) -> None:  # fmt: skip
    """Look at a model in a browser: slifmr serve --checkpoint=saved/SLIFMR-....pth (extra 'serve').

    Users, their items, what they are recommended and why, similar items; the same as JSON under /api. Nothing is
    written. Anybody who reaches the address can read all of it: there is no log-in.
    """
    if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn")):
        raise SettingError(
            "slifmr serve needs FastAPI and uvicorn: pip install fastapi uvicorn, or the package with its extra 'serve'"
        )
    if images is not None and image_field is not None:
        raise SettingError("images come from a folder, --images, or from addresses, --image_field: leave one out")
    from recbole_slifmr.serve.web import bind, make_app, run_app

    with bind(host, port) as listener:  # before anything is loaded
        from recbole_slifmr.serve.lookup import Lookup, find_images, read_image_urls
        from recbole_slifmr.serve.names import find_title, read_item_columns
        from recbole_slifmr.serve.trained import load_trained

        files = find_images(images) if images is not None else {}
        trained = load_trained(checkpoint, data_path, dataset, model)
        config = trained.config
        columns = read_item_columns(config, find_title(config) if show is None else split_names(show))
        addresses = {token: f"image?item={quote(token, safe='')}" for token in files}
        if image_field is not None:
            addresses = read_image_urls(config, image_field)
        app = make_app(Lookup(trained, columns, addresses, explain), files, _names(host), timeout)
        listener.listen()
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        click.echo(f"{config['model']} on {config['dataset']}: {address} (Ctrl+C stops)")
        run_app(app, listener)


def _names(host: str) -> list[str]:
    """Return the names by which a server on this address may be called: any if others reach it."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    return [*LOOPBACK, host] if local else ["*"]
