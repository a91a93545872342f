"""Search for dataset files and downloads of missing ones."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bdjax.errors import InputError

DATA_DIR_VARIABLE = "BDJAX_DATA_DIR"
_CONNECT_AND_READ_SECONDS = (5, 10)


class RemoteFile(NamedTuple):
    """A published file."""

    file_name: str
    md5: str
    base_urls: tuple[str, ...]
    """the publisher's URL, then mirrors; each ends in "/" """


def cache_folder() -> Path:
    """Returns the folder for downloads."""
    import pooch  # here and below, since importing it takes longer than --help

    return Path(pooch.os_cache("bdjax"))


def search_folders(data_dir: str | os.PathLike | None) -> tuple[Path, ...]:
    """Lists the folders to search for dataset files, in order.

    Args:
        data_dir: The caller's folder, if any. It must exist.

    Returns:
        `data_dir`, $BDJAX_DATA_DIR, and the user's cache.

    Raises:
        InputError: If `data_dir` is not a folder.
    """
    folders = []
    if data_dir is not None:
        if not Path(data_dir).expanduser().is_dir():
            raise InputError(f"data_dir {data_dir}: no such folder")
        folders.append(Path(data_dir).expanduser())
    if os.environ.get(DATA_DIR_VARIABLE):
        folders.append(Path(os.environ[DATA_DIR_VARIABLE]).expanduser())
    return (*folders, cache_folder())


def fetch(files: Sequence[RemoteFile], subfolder: str) -> dict[str, Path]:
    """Downloads files into the cache, unless they are already there with the right checksum.

    Args:
        files: What to download.
        subfolder: The folder inside the cache to put them in.

    Returns:
        The path of each file, by its name.

    Raises:
        InputError: If a file cannot be downloaded from any of its URLs, with the reason, to be quoted by `not_found`.
    """
    return {file.file_name: _fetch_one(file, cache_folder() / subfolder) for file in files}


def not_found(name: str, wanted: str, folders: Sequence[Path], hint: str) -> InputError:
    """Makes the error for a dataset that was not found.

    Args:
        name: The dataset.
        wanted: The files or folders that were searched for.
        folders: The folders that were searched.
        hint: Where to get the files and where to put them, from `download_hint`.

    Returns:
        The error, for the caller to raise.
    """
    listed = ", ".join(str(folder) for folder in folders)
    return InputError(f"{name}: found no {wanted} in {listed}; {hint}")


def download_hint(files: Sequence[RemoteFile], destination: Path, download: bool, failure: object = None) -> str:
    """Makes the second half of `not_found`: where the files are published and where to put them.

    Args:
        files: The files, all published at the same URL.
        destination: The folder to put them in.
        download: Whether downloading was allowed.
        failure: Why the download failed, if it was attempted.

    Returns:
        Part of a line.
    """
    reason = f"the download failed ({failure})" if download else "downloads are switched off"
    names = ", ".join(file.file_name for file in files)
    return f"{reason}: put {names} from {files[0].base_urls[0]} into {destination}"


def _fetch_one(file: RemoteFile, destination: Path) -> Path:
    import pooch

    failures = []
    for base_url in file.base_urls:
        try:
            with _quiet_pooch():
                path = pooch.retrieve(
                    url=base_url + file.file_name,
                    known_hash=f"md5:{file.md5}",
                    fname=file.file_name,
                    path=destination,
                    # Files have up to 200 MB, for which pooch's chunks of 1 KiB are slow.
                    downloader=pooch.HTTPDownloader(timeout=_CONNECT_AND_READ_SECONDS, chunk_size=1 << 18),
                )
            return Path(path)
        except ValueError as error:  # from pooch on a wrong checksum, from requests on a malformed response
            wrong = f"its MD5 is not {file.md5}" if "hash" in str(error) else type(error).__name__
            failures.append(f"{base_url}{file.file_name}: {wrong}")
        except OSError as error:  # other errors of requests, and a cache that cannot be written
            status = getattr(getattr(error, "response", None), "status_code", None)
            what = f"HTTP status {status}" if status else error.strerror or type(error).__name__
            failures.append(f"{base_url}{file.file_name}: {what}")
    raise InputError("; ".join(failures))


@contextmanager
def _quiet_pooch() -> Iterator[None]:
    import pooch

    # pooch logs "Downloading data from ..." to stderr; errors are reported by the caller.
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
