"""Item features made from the texts and images of items.

Texts become TF-IDF vectors under a truncated SVD (latent semantic analysis, Deerwester et al., JASIS 1990), or the
embeddings of a sentence-transformers model; images the embeddings of a model that takes them, such as CLIP.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recbole_slifmr.data.features import is_modality_name
from recbole_slifmr.data.vectors import OWN_IDS, ItemFile, read_tokens, write_tokens
from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.files import replace_file, write_json

TFIDF = "TF-IDF + truncated SVD"
DIMENSION = 128  # of its vectors
CLIP = "sentence-transformers/clip-ViT-B-32"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


class Inputs(NamedTuple):
    """What features are made from: an item token and a text, or the path of an image, each."""

    tokens: list[str]
    contents: list[Any]


def read_texts(item_file: ItemFile, fields: Sequence[str]) -> Inputs:
    """Return the text of each item that has one: its fields side by side.

    Raises:
        DataError: if the file or a field is missing, or no item has text.
    """
    frame = item_file.columns(*fields)
    texts = (
        frame[fields[0]].str.strip().str.cat([frame[field].str.strip() for field in fields[1:]], sep=" ").str.strip()
    )
    texts = texts[(texts != "") & ~texts.index.duplicated()]
    if texts.empty:
        raise DataError(f"{item_file.path}: {', '.join(fields)} of every item are empty")
    return Inputs(texts.index.tolist(), texts.tolist())


def find_images(folder: Path, item_file: ItemFile) -> Inputs:
    """Return the images of a folder that are named by an item token: ``TOKEN.jpg``, ``TOKEN.png``, ...

    Without an ``.item`` file every image counts as an item's.

    Raises:
        DataError: if there is no folder, no image of an item, or more than one of the same item.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    found = {path.stem: path for path in paths}
    for path in paths:
        if found[path.stem] != path:
            raise DataError(f"{folder}: {path.name} and {found[path.stem].name} are of the same item: leave one")
    tokens = list(found)
    if item_file.path.is_file():
        tokens = [token for token in item_file.columns(item_file.id_field).index.unique() if token in found]
    if not tokens:
        example = f" (such as {paths[0].name})" if paths else ""
        raise DataError(
            f"{folder}: none of its {len(paths)} images{example} is named by an item token, as TOKEN.jpg is"
        )
    return Inputs(tokens, [found[token] for token in tokens])


def tfidf_vectors(texts: Sequence[str], dimension: int = DIMENSION) -> np.ndarray:
    """Return TF-IDF vectors under a truncated SVD; the same on every run.

    Args:
        texts: ``[n]``.
        dimension: of the vectors; less if there are fewer texts or words.

    Returns:
        ``[n, dimension]`` float32; zeros for a text without a word.

    Raises:
        DataError: if no text has a word.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        tfidf = TfidfVectorizer(sublinear_tf=True, stop_words="english").fit_transform(texts)
    except ValueError as error:
        raise DataError(f"the texts of the {len(texts)} items hold no words: {error}") from None
    return TruncatedSVD(min(dimension, *tfidf.shape), random_state=0).fit_transform(tfidf).astype(np.float32)


def load_encoder(model: str) -> Any:
    """Return a sentence-transformers model by its name on huggingface.co or its folder.

    Raises:
        SettingError: if the extra ``encoders`` is not installed or the model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise SettingError(
            f"the model {model} needs sentence-transformers ({error}): pip install 'recbole-slifmr[encoders]'"
        ) from None
    try:
        return SentenceTransformer(model)
    except Exception as error:  # not found, no network, no room, not a model: whatever its hub raises
        reason = " ".join(str(error).split())[:300]
        raise SettingError(
            f"the model {model} cannot be loaded; name one on huggingface.co or a folder: {reason}"
        ) from error


def encode(
    encoder: Any,
    name: str,
    contents: Sequence[Any],
    parts: Path,
    batch_size: int,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Encode texts or images in batches; what an interrupted run has done is not done again.

    Each batch is kept in a file named by what it was made from.

    Args:
        encoder: a model with sentence-transformers' ``encode``.
        name: of the model.
        contents: texts, or paths of images.
        parts: folder of the batches.
        batch_size: texts or images at a time.
        on_batch: called after each batch with the number of contents done and of all.

    Returns:
        the ``.npy`` files of the batches, float32 ``[n_b, d]``, in order.

    Raises:
        DataError: if an image cannot be read.
    """
    parts.mkdir(exist_ok=True)
    files = []
    for start in range(0, len(contents), batch_size):
        batch = contents[start : start + batch_size]
        file = parts / f"{_digest(name, batch)}.npy"
        if not file.is_file():
            loaded = [_open_image(entry) if isinstance(entry, Path) else entry for entry in batch]
            vectors = encoder.encode(loaded, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)
            _save(file, [vectors], vectors.shape)
        on_batch(start + len(batch), len(contents))
        files.append(file)
    return files


def _digest(name: str, batch: Sequence[Any]) -> str:
    """Return a hash of a model and a batch: of texts themselves, of an image's path, size and time."""
    digest = hashlib.sha256(name.encode())
    for entry in batch:
        if isinstance(entry, Path):
            state = entry.stat()
            entry = f"{entry.resolve()} {state.st_size} {state.st_mtime_ns}"
        digest.update(hashlib.sha256(entry.encode()).digest())
    return digest.hexdigest()[:32]


def _open_image(path: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # a broken image can raise anything
        raise DataError(
            f"{path} cannot be read as an image: mend or remove it and run again to go on ({error})"
        ) from None


def _save(path: Path, blocks: Iterable[np.ndarray], shape: tuple[int, int]) -> None:
    """Write blocks of rows as one ``.npy``, whole or not at all, without joining them in memory."""

    def write(part: Path) -> None:
        array = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
        start = 0
        for block in blocks:
            array[start : start + len(block)] = block
            start += len(block)
        array.flush()

    replace_file(path, write)


def write_features(
    folder: Path, name: str, tokens: Sequence[str], blocks: Iterable[np.ndarray], dimension: int, **card: Any
) -> dict[str, Any]:
    """Write ``NAME.npy``, its tokens ``NAME.ids.txt`` and a card ``NAME.json``.

    The array comes last, and an older one with other tokens goes first: no array ever lies beside another's tokens.

    Args:
        folder: where to.
        name: of the modality.
        tokens: item token of each row.
        blocks: the rows, in parts ``[n_b, dimension]``.
        dimension: of the vectors.
        card: what the features were made of.

    Returns:
        the card.
    """
    array, ids = folder / f"{name}.npy", folder / f"{name}{OWN_IDS}"
    if array.exists() and not (ids.is_file() and read_tokens(ids).tolist() == list(tokens)):
        array.unlink()
    write_tokens(ids, tokens)
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    card = {"name": name, "items": len(tokens), "dimension": dimension, **card, "date": date}
    write_json(folder / f"{name}.json", card)
    _save(array, blocks, (len(tokens), dimension))
    return card


def check_target(folder: Path, name: str, overwrite: bool) -> None:
    """Refuse, before any work is done, a target that cannot or should not be written.

    Raises:
        SettingError: if the features are there already or the folder cannot be written to.
    """
    if not is_modality_name(name):
        raise SettingError(f"--name: '{name}' cannot be a modality's name: use another, such as text or image")
    for path in (folder / f"{name}.npy", folder / f"{name}{OWN_IDS}", folder / f"{name}.json"):
        if path.exists() and not overwrite:
            raise SettingError(f"{path} is there already: give another --name, or --overwrite it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"{folder}: {error.strerror}; name another with --feature_path") from None
    if not os.access(folder, os.W_OK):
        raise SettingError(f"{folder} cannot be written to: name another with --feature_path")


def extract(
    folder: Path,
    name: str,
    inputs: Inputs,
    model: str | None,
    dimension: int = DIMENSION,
    batch_size: int = 64,
    overwrite: bool = False,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    **card: Any,
) -> dict[str, Any]:
    """Make the features of a modality and write them, see :func:`write_features`.

    Args:
        folder: of the features.
        name: of the modality.
        inputs: texts or images.
        model: of sentence-transformers; TF-IDF if None.
        dimension: of TF-IDF vectors.
        batch_size: of a model.
        overwrite: whether to replace features of the same name.
        on_batch: called with the number of items done and of all.
        card: more for the card.

    Returns:
        the card.

    Raises:
        DataError, SettingError: for inputs or settings that cannot be used.
    """
    check_target(folder, name, overwrite)
    if model is None:
        values = tfidf_vectors(inputs.contents, dimension)
        return write_features(folder, name, inputs.tokens, [values], values.shape[1], model=TFIDF, **card)
    parts = folder / f".{name}.parts"
    files = encode(load_encoder(model), model, inputs.contents, parts, batch_size, on_batch)
    blocks = (np.load(file, allow_pickle=False) for file in files)
    dimension = np.load(files[0], mmap_mode="r").shape[1]
    card = write_features(folder, name, inputs.tokens, blocks, dimension, model=model, **card)
    shutil.rmtree(parts)
    return card
