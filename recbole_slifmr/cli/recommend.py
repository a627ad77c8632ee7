"""``slifmr recommend``: the best items for users, the nearest items of an item."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pandas as pd

from recbole_slifmr.cli.options import parse_files, split_names, with_options
from recbole_slifmr.errors import DataError, SettingError

if TYPE_CHECKING:
    from recbole_slifmr.serve.names import ItemColumns

INDENT = 4  # of the sentences that explain
TRAINED_OPTIONS = [
    click.option("--checkpoint", required=True, type=click.Path(path_type=Path), help="File that a training saved."),
    click.option("--data_path", "--data-path", default=None, help="Folder of the data set's folder, if it moved."),
    click.option("--dataset", "-d", default=None, help="Name of the data set, if it changed."),
    click.option("--model", "-m", default=None, help="module:Class of a model of your own: no file chooses code."),
]


def _read_lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error


def _split(text: str) -> list[str]:
    return [token.strip() for token in text.split(",") if token.strip()]


def _read_tokens(file: Path) -> list[str]:
    """Return the tokens of a file, one a line."""
    lines = _read_lines(file)
    tokens = [line.strip() for line in lines if line.strip()]
    if not tokens:
        raise DataError(f"{file} holds no tokens: it should have one a line")
    return tokens


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@with_options(
    *TRAINED_OPTIONS,
    click.option("--users", default=None, help="User tokens with commas between them."),
    click.option("--users_file", "--users-file", type=click.Path(path_type=Path), help="File of user tokens."),
    click.option("--all", "everybody", is_flag=True, help="Recommend to all users."),
    click.option("--history", default=None, help="Item tokens of a user who was not in training, with commas."),
    click.option("--histories", type=click.Path(path_type=Path), help="File of such users, a line of tokens each."),
    click.option("--new_items", "--new-items", type=click.Path(path_type=Path),
                 help="Recommend items that were not in training instead: a file with a row per item."),
    click.option("--new_triples", "--new-triples", type=click.Path(path_type=Path),
                 help="Their triples: a file of head, relation and tail."),
    click.option("--new_features", "--new-features", multiple=True,
                 help="Their features: image=F.npy,text=F.parquet, as for convert csv."),
    click.option("--similar_items", "--similar-items", "item", default=None, help="Item whose nearest items to show."),
    click.option("--k", default=20, show_default=True, type=click.IntRange(min=1), help="Items per user."),
    click.option("--exclude_seen/--include_seen", "--exclude-seen/--include-seen", "exclude_seen", default=True,
                 help="Leave out the user's items in the training, validation and test split.  [exclude]"),
    click.option("--candidates", type=click.Path(path_type=Path), help="File of the items that may be recommended."),
    click.option("--explain", is_flag=True,
                 help="Say why (SLIFMR, closed forms): a sentence each, or nested with --format=jsonl. 'because of' "
                 "names the items that add most to the linear part of the score, and 'content adds' a part of it: both "
                 "exact; 'shares' and 'near' name what the model had at hand."),
    click.option("--show", default=None,
                 help="Columns of the .item file beside an item's id, e.g. title,year.  [for people: its title]"),
    click.option("--format", "kind", type=click.Choice(["csv", "jsonl", "parquet"]),
                 help="Of the output.  [that of --out's name, else csv]"),
    click.option("--out", type=click.Path(path_type=Path), help="File to write; printed without."),
)  # fmt: skip
def recommend(
    checkpoint: Path,
    data_path: str | None,
    dataset: str | None,
    model: str | None,
    users: str | None,
    users_file: Path | None,
    everybody: bool,
    history: str | None,
    histories: Path | None,
    new_items: Path | None,
    new_triples: Path | None,
    new_features: tuple[str, ...],
    item: str | None,
    k: int,
    exclude_seen: bool,
    candidates: Path | None,
    explain: bool,
    show: str | None,
    kind: str | None,
    out: Path | None,
) -> None:
    """Recommend items: slifmr recommend --checkpoint=saved/SLIFMR-....pth --users=196,186 --k=10.

    Users and items are named as in the data set's files. Files of tokens hold one a line. Users who were not in
    training are known by the items they have; they are called by the number of their line.
    """
    chosen = [given is not None for given in (users, users_file, history, histories, item)]
    if sum(chosen) + everybody != 1:
        raise SettingError(
            "name users with --users, --users-file or --all, new ones with --history or --histories, or an item with "
            "--similar-items"
        )
    if explain and users is None and users_file is None:
        raise SettingError("--explain is for users named by --users or --users-file")
    is_new = history is not None or histories is not None
    if is_new and not exclude_seen:
        raise SettingError("the items of --history and --histories are never recommended: leave out --include-seen")
    if new_items is None and (new_triples is not None or new_features):
        raise SettingError("--new-triples and --new-features are of --new-items: name the file of items too")
    if new_items is not None and (explain or item is not None or candidates is not None or show is not None):
        raise SettingError("--new-items goes without --explain, --similar-items, --candidates and --show")
    as_table = explain and kind is None and out is None
    suffix = out.suffix[1:] if out is not None else ""
    for_people = as_table or (kind is None and out is None and sys.stdout.isatty())
    kind = kind or (suffix if suffix in ("csv", "jsonl", "parquet") else "jsonl" if explain else "csv")
    if explain and kind != "jsonl":
        raise SettingError(f"explanations are nested, and {kind} is flat: leave out --format or set it to jsonl")

    from recbole_slifmr.serve.names import find_title, read_item_columns
    from recbole_slifmr.serve.recommend import recommend as rank
    from recbole_slifmr.serve.recommend import similar_items, table, write_tables
    from recbole_slifmr.serve.trained import load_trained

    trained = load_trained(checkpoint, data_path, dataset, model)
    by_title = show is None and for_people and new_items is None
    shown = find_title(trained.config) if by_title else split_names(show or "")
    columns = read_item_columns(trained.config, shown)
    if item is not None:
        nearest = similar_items(trained, int(trained.item_ids([item])[0]), k)
        write_tables([columns.beside(nearest, "similar_item")], kind, out, sys.stdout)
        return
    import numpy as np

    allowed = None if candidates is None else trained.item_ids(_read_tokens(candidates))
    user_tokens, item_tokens, known = trained.user_tokens, trained.item_tokens, []
    if is_new:
        named = [_split(line) for line in ([history or ""] if histories is None else _read_lines(histories))]
        trained.item_ids([token for tokens in named for token in tokens])  # all that are unknown, in one message
        ids, user_tokens = np.arange(len(named)), np.arange(1, len(named) + 1).astype(str).astype(object)
        known = [trained.item_ids(tokens) for tokens in named]
    else:
        tokens = _read_tokens(users_file) if users_file else [user.strip() for user in (users or "").split(",")]
        ids = np.arange(1, trained.n_users) if everybody else trained.user_ids(tokens)
    if new_items is not None:
        from recbole_slifmr.data.new_items import read_new_item_files
        from recbole_slifmr.serve.new_items import NewItemScorer, check_model

        check_model(trained)
        features = parse_files(new_features, "--new-features")
        with warnings.catch_warnings(record=True) as left_out:
            new = read_new_item_files(trained.dataset, new_items, new_triples, features)
        for warning in left_out:
            click.echo(str(warning.message), err=True)
        of_new = NewItemScorer(trained, new)
        item_tokens = of_new.tokens
        rankings = of_new.recommend_for(known, k) if is_new else of_new.recommend(ids, k)
    elif is_new:
        from recbole_slifmr.serve.newcomers import recommend_for, scorer

        rankings = recommend_for(scorer(trained), known, k, trained.n_items, allowed)
    else:
        rankings = rank(trained, ids, k, exclude_seen, allowed)
    if explain:
        from recbole_slifmr.serve.explain import make_explainer

        explainer = make_explainer(trained)

    def tables() -> Iterator[pd.DataFrame]:
        for ranking in rankings:
            frame = table(ranking, user_tokens, item_tokens)
            if explain:
                frame["explanation"] = [reason for row in explainer.explain(ranking) for reason in row]
            yield columns.beside(frame, "item")

    if as_table:
        for frame in tables():
            _print_explained(frame, columns)
    else:
        n_rows = write_tables(tables(), kind, out, sys.stdout)
        if out is not None:
            click.echo(f"{n_rows} recommendations for {len(ids)} users: {out}")


def _print_explained(frame: pd.DataFrame, columns: ItemColumns) -> None:
    """Print two lines of at most 80 cells per recommendation: the item with its score, and why."""
    from recbole_slifmr.serve.sentence import WIDTH, sentence, shorten

    for user, rows in frame.groupby("user", sort=False):
        views = rows["explanation"].iloc[0].get("user_views")
        click.echo(f"user {user}" + (f", views: {_weights(views)}" if views else ""))
        for row in rows.itertuples():
            rank, score = f"{row.rank:>2}  ", f"  {row.score:.4f}"
            item = shorten(f"{row.item} {', '.join(columns.of(row.item))}", INDENT + WIDTH - len(rank + score))
            click.echo(f"{rank}{item}{score}")
            click.echo(f"{' ' * INDENT}{sentence(row.explanation, columns.name)}")


def _weights(views: dict[str, float]) -> str:
    return ", ".join(f"{name} {weight:.2f}" for name, weight in views.items())
