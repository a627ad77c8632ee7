"""Files that run code when they are read are read only if this user wrote them.

RecBole pickles data sets and loaders, Ray the state of a search, and a pickle may run anything. Such a file gets a seal
at its end: a keyed hash of its content, with a key that this user alone can read. A file from elsewhere has none.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
from pathlib import Path

from recbole_slifmr.errors import DataError

HASH = "sha256"
LENGTH = 32  # bytes, of key and seal


def seal(content: bytes) -> bytes:
    """Return the content with a seal at its end, where what reads pickles does not look."""
    return content + hmac.digest(_key(), content, HASH)


def unseal(content: bytes, path: str | Path) -> bytes:
    """Return the content without its seal.

    Args:
        content: what :func:`seal` gave.
        path: where it was read, for the message.

    Raises:
        DataError: if it has none of this user's.
    """
    body, found = content[:-LENGTH], content[-LENGTH:]
    if not hmac.compare_digest(found, hmac.digest(_key(), body, HASH)):
        raise DataError(
            f"{path} was not written by you with this version, and reading it could run code: remove it to have it "
            "made anew"
        )
    return body


def _key() -> bytes:
    """Return this user's key; the first call makes it."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    file = Path(data) / "recbole-slifmr" / "key"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{secrets.token_hex(4)}.part")
        part.touch(mode=0o600)
        part.write_bytes(secrets.token_bytes(LENGTH))
        with contextlib.suppress(FileExistsError):  # of two that make it at once, the first one's stays
            os.link(part, file)
        part.unlink()
    return file.read_bytes()
