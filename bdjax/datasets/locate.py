"""Where dataset files are looked for, and how the missing ones are fetched."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pooch

from bdjax.errors import InputError

DATA_DIR_VARIABLE = "BDJAX_DATA_DIR"
_CONNECT_AND_READ_SECONDS = (5, 10)


class RemoteFile(NamedTuple):
    """A file as its publisher offers it."""

    file_name: str
    md5: str
    base_urls: tuple[str, ...]
    """the publisher first, then mirrors; each ends in "/" """


def cache_folder() -> Path:
    """Returns the folder that downloads go to."""
    return Path(pooch.os_cache("bdjax"))


def search_folders(data_dir: str | os.PathLike | None) -> tuple[Path, ...]:
    """Lists the folders in which dataset files are looked for, the first first.

    Args:
        data_dir: The folder that the caller asked for, if any. It must exist.

    Returns:
        `data_dir`, the folder in $BDJAX_DATA_DIR, and the user's cache.

    Raises:
        InputError: If `data_dir` is not a folder.
    """
    folders = []
    if data_dir is not None:
        if not Path(data_dir).expanduser().is_dir():
            raise InputError(f"data_dir {data_dir}: there is no such folder")
        folders.append(Path(data_dir).expanduser())
    if os.environ.get(DATA_DIR_VARIABLE):
        folders.append(Path(os.environ[DATA_DIR_VARIABLE]).expanduser())
    return (*folders, cache_folder())


def fetch(files: Sequence[RemoteFile], subfolder: str) -> dict[str, Path]:
    """Downloads files into the cache, each only if it is not there yet with the right checksum.

    Args:
        files: What to download.
        subfolder: The folder inside the cache to put them in.

    Returns:
        The path of each file, by its name.

    Raises:
        InputError: If a file cannot be had from any of its URLs; it says why, and is meant to be quoted by `not_found`.
    """
    return {file.file_name: _fetch_one(file, cache_folder() / subfolder) for file in files}


def not_found(name: str, looked_for: str, folders: Sequence[Path], how_to_get_it: str) -> InputError:
    """Words the error for a dataset that is nowhere.

    Args:
        name: The dataset.
        looked_for: The files or folders that would have done.
        folders: Where they were looked for.
        how_to_get_it: The URL, and where to put what comes from it.

    Returns:
        The error, for the caller to raise.
    """
    listed = ", ".join(str(folder) for folder in folders)
    return InputError(f"{name}: found no {looked_for} in {listed}; {how_to_get_it}")


def download_hint(files: Sequence[RemoteFile], destination: Path, download: bool, failure: object = None) -> str:
    """Words the second half of `not_found`: where the files are published and where to put them.

    Args:
        files: The files, all published at the same URL.
        destination: The folder to put them in.
        download: Whether downloading was allowed.
        failure: Why downloading failed, if it was tried.

    Returns:
        Part of a line.
    """
    tried = f"downloading failed ({failure})" if download else "downloading is switched off"
    names = ", ".join(file.file_name for file in files)
    return f"{tried}: get {names} from {files[0].base_urls[0]} into {destination}"


def _fetch_one(file: RemoteFile, destination: Path) -> Path:
    failures = []
    for base_url in file.base_urls:
        try:
            with _quiet_pooch():
                path = pooch.retrieve(
                    url=base_url + file.file_name,
                    known_hash=f"md5:{file.md5}",
                    fname=file.file_name,
                    path=destination,
                    # Files reach 200 MB, for which pooch's 1 KiB a chunk is slow.
                    downloader=pooch.HTTPDownloader(timeout=_CONNECT_AND_READ_SECONDS, chunk_size=1 << 18),
                )
            return Path(path)
        except ValueError as error:  # pooch's word for a wrong checksum; requests raises it on a malformed answer
            wrong = f"its MD5 is not {file.md5}" if "hash" in str(error) else type(error).__name__
            failures.append(f"{base_url}{file.file_name}: {wrong}")
        except OSError as error:  # all of requests' errors, and a cache that cannot be written
            status = getattr(getattr(error, "response", None), "status_code", None)
            what = f"HTTP status {status}" if status else error.strerror or type(error).__name__
            failures.append(f"{base_url}{file.file_name}: {what}")
    raise InputError("; ".join(failures))


@contextmanager
def _quiet_pooch() -> Iterator[None]:
    # pooch logs "Downloading data from ..." to stderr; the error, if there is one, is reported by us.
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
