"""MovieLens by name: fetched from its makers or from a local archive, checked, read and cached.

No rating is part of this project. The sets are GroupLens's: research use, citation required.
"""

from __future__ import annotations

import errno
import http
import http.client
import lzma
import re
import shutil
import ssl
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from ..extras import needs
from ..jsonfile import read_json, write_json
from .cache import Cached, digest, file_sum, load_file, open_columns, say, scratch, writing
from .ratings import DataError, fail

LICENCE = (
    "free for research under the terms in its README: cite the paper below, do not redistribute "
    "the ratings, ask GroupLens before any commercial use"
)
CITATION = (
    "F. Maxwell Harper and Joseph A. Konstan. The MovieLens Datasets: History and Context. "
    "ACM Transactions on Interactive Intelligent Systems 5(4):19, 2015. doi:10.1145/2827872"
)
_SITE = "https://files.grouplens.org/datasets/movielens"
TIMEOUT_SECONDS = 30.0
_PIECE = 1 << 20
# Of zipfile; UnicodeError for the names in an archive, RuntimeError where it cannot unpack.
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, UnicodeError, RuntimeError)
# A try that brought bytes is followed by another, up to this many in one call.
_TRIES = 5
_INSTEAD = "a local copy of the archive works too: --archive FILE"


@dataclass(frozen=True)
class Dataset:
    """One set of ratings as its makers publish it.

    Example:
        >>> MOVIELENS["ml-1m"].url
        'https://files.grouplens.org/datasets/movielens/ml-1m.zip'
    """

    name: str
    member: str  # path of the ratings inside the archive
    md5: str | None = None  # of the archive; None where it lies beside the archive
    licence: str = LICENCE
    citation: str = CITATION

    @property
    def url(self) -> str:
        """Address of the archive."""
        return f"{_SITE}/{self.name}.zip"

    @property
    def kind(self) -> str:
        """Suffix of the ratings' file, which says how it is laid out."""
        return PurePosixPath(self.member).suffix


MOVIELENS = {
    dataset.name: dataset
    for dataset in (
        Dataset("ml-100k", "ml-100k/u.data", "0e33842e24a9c977be4e0107933c0723"),
        Dataset("ml-1m", "ml-1m/ratings.dat", "c4d9eecfca2ab87c1945afe126590906"),
        Dataset("ml-10m", "ml-10M100K/ratings.dat"),
        Dataset("ml-20m", "ml-20m/ratings.csv", "cd245b17a1ae2cc31bb14903e1204af3"),
        Dataset("ml-25m", "ml-25m/ratings.csv", "6b51fb2759a8657d3bfcbfc42b592ada"),
        Dataset("ml-32m", "ml-32m/ratings.csv", "d472be332d4daa821edc399621853b57"),
        Dataset("ml-latest", "ml-latest/ratings.csv"),
        Dataset("ml-latest-small", "ml-latest-small/ratings.csv"),
    )
}


def load_movielens(
    name: str, *, archive: Path | None, url: str | None, malformed: str, folder: Path
) -> Cached:
    """Return the columns of a set and the sha256 of its ratings file.

    A set that is in the cache is not fetched, and its archive is not needed. `ml-10m`, `ml-latest`
    and `ml-latest-small` are fetched again if `url` is another than the last; to get a newer
    `ml-latest`, remove `movielens/ml-latest.json` from the cache folder.

    Args:
        name: a key of `MOVIELENS`.
        archive: a local zip to read instead of a download.
        url: http(s) address of the zip, in place of the set's own. Where the set's checksum is
            not known here it is read from `url` + `.md5`.
        malformed: `"refuse"` or `"skip"`.
        folder: the cache folder.

    Raises:
        DataError: if the archive cannot be had, does not have the set's checksum or is damaged,
            the cache cannot be written, or the ratings cannot be read. What was cached before
            stays as it is.
    """
    dataset = MOVIELENS[name]
    note = folder / "movielens" / f"{name}.json"
    known = read_json(note)
    md5 = None if archive is None else _archive_sum(dataset, archive, folder)
    if _is_current(dataset, known, md5, url):
        checksum = str(known.get("sha256"))
        columns = open_columns(
            checksum, dataset.kind, name=name, malformed=malformed, folder=folder
        )
        if columns is not None:
            return columns, checksum
    with writing(name, folder):
        if archive is None:
            md5, archive = _kept(dataset, known, url, folder) or _download(dataset, url, folder)
        with scratch(folder) as temporary:
            member = _extract(dataset, archive, temporary)
            cached = load_file(member, dataset.kind, name=name, malformed=malformed, folder=folder)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, {"md5": md5, "url": url, "sha256": cached[1]})
    if not known:
        say(f"{name}: {dataset.licence}. {dataset.citation}")
    return cached


def _is_current(dataset: Dataset, known: dict[str, Any], md5: str | None, url: str | None) -> bool:
    """Whether the cached set is the one that a call means; `md5` is that of a local archive."""
    if not known:
        return False
    expected = md5 or dataset.md5
    return known.get("md5") == expected if expected else url in (None, known.get("url"))


def _kept(
    dataset: Dataset, known: dict[str, Any], url: str | None, folder: Path
) -> tuple[str, Path] | None:
    """Return md5 and path of the archive that an earlier call left, if it is what it was."""
    archive = folder / "archives" / f"{dataset.name}.zip"
    md5 = dataset.md5 or (known.get("md5") if url in (None, known.get("url")) else None)
    if md5 is None or not archive.is_file() or digest(archive, "md5") != md5:
        return None
    return md5, archive


def _archive_sum(dataset: Dataset, archive: Path, folder: Path) -> str:
    """Return the md5 of a local archive that is the set's as far as can be told."""
    if not archive.is_file():
        fail(str(archive), "no such file")
    try:
        md5 = file_sum(archive, "md5", folder)
        beside = archive.with_name(archive.name + ".md5")
        expected = dataset.md5
        if expected is None and beside.is_file():
            expected = _find_md5(beside.read_bytes(), str(beside))
    except OSError as error:
        fail(str(archive), f"cannot be read: {error.strerror or error}")
    if expected is not None and md5 != expected:
        fail(str(archive), f"is not the archive of {dataset.name}: md5 {md5}, expected {expected}")
    if expected is None:
        say(f"{dataset.name}: no checksum to hold {archive} against ({beside.name} is not there)")
    return md5


def _find_md5(text: bytes, where: str) -> str:
    match = re.search(rb"(?<![0-9a-zA-Z])[0-9a-fA-F]{32}(?![0-9a-zA-Z])", text)
    if match is None:
        fail(where, "holds no md5 checksum")
    return match[0].decode().lower()


def _download(dataset: Dataset, url: str | None, folder: Path) -> tuple[str, Path]:
    """Fetch the archive; returns its md5 and its path."""
    name, url = dataset.name, url or dataset.url
    try:
        import pooch  # type: ignore[import-untyped]
        from tqdm import tqdm  # noqa: F401
    except ImportError:
        fail(name, needs("a download", ["pooch", "tqdm"]))
    if not url.lower().startswith(("https://", "http://")):
        fail(name, f"url must begin with https:// or http://, got {url!r}")
    md5 = dataset.md5 or _published_sum(name, f"{url}.md5")
    archives = folder / "archives"
    pooch.get_logger().setLevel("WARNING")  # its lines would say twice what the bar says
    while True:
        # The sum in the name: bytes of an older release are never continued.
        fetch = _Download(name, archives / f"{name}-{md5[:8]}.part")
        try:
            path = pooch.retrieve(
                url, known_hash=f"md5:{md5}", fname=f"{name}.zip", path=archives, downloader=fetch
            )
            return md5, Path(path)
        except DataError:
            raise
        except ValueError:
            if not fetch.continued:
                fail(name, f"{url} has md5 {fetch.md5}, expected {md5}; nothing was kept")
            # What was continued may have been something else: once more, from the start.


def _published_sum(name: str, url: str) -> str:
    try:
        with _open(url) as response:
            return _find_md5(response.read(4096), url)
    except (OSError, http.client.HTTPException) as error:
        fail(name, f"no checksum from {url}: {_reason(error)}; {_INSTEAD}")


class _Download:
    """A downloader for pooch that continues where an earlier one was cut off.

    What arrives is appended to `part`, which outlives a lost connection, and becomes pooch's file
    when it is complete; pooch holds that against the checksum.
    """

    def __init__(self, name: str, part: Path) -> None:
        self.name = name
        self.part = part
        self.continued = False  # whether bytes of an earlier call are in it
        self.md5 = ""

    def __call__(self, url: str, output_file: str, pooch: object) -> None:
        self.continued = self._size() > 0
        for left in reversed(range(_TRIES)):
            size = self._size()
            try:
                self._fetch(url, size)
                break
            except (OSError, http.client.HTTPException) as error:
                if not left or self._size() <= size:
                    self._give_up(url, error)
        self.md5 = digest(self.part, "md5")
        self.part.replace(output_file)

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _write(self, piece: bytes, mode: str = "ab") -> None:
        try:
            with self.part.open(mode) as file:
                file.write(piece)
        except OSError as error:
            # Half an archive only fills the disk further.
            self.part.unlink(missing_ok=True)
            what = f"cannot write the cache {self.part.parent}: {error.strerror or error}"
            raise DataError(f"{self.name}: {what}") from error

    def _give_up(self, url: str, error: Exception) -> NoReturn:
        size = self._size()
        kept = f"; {size:,} bytes are kept and the next call continues" if size else ""
        fail(self.name, f"cannot be fetched from {url}: {_reason(error)}{kept}; {_INSTEAD}")

    def _fetch(self, url: str, size: int) -> None:
        """Append what is missing after `size` bytes."""
        from tqdm import tqdm

        try:
            response = _open(url, size)
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not size:
                raise
            self.continued = True  # complete already, or of another file: the checksum decides
            return
        with response:
            if response.status != http.HTTPStatus.PARTIAL_CONTENT:
                size, self.continued = 0, False  # the server does not continue
            length = response.headers.get("Content-Length")
            total = size + int(length) if length else None
            bar = tqdm(
                total=total,
                initial=size,
                desc=self.name,
                unit="B",
                unit_scale=True,
                disable=None,  # no bar where stderr is no terminal
            )
            with bar:
                self._write(b"", "ab" if size else "wb")
                # read1 gives what is there: what came before a cut is not lost.
                while piece := response.read1(_PIECE):
                    self._write(piece)
                    bar.update(len(piece))
        if total is not None and self._size() < total:
            raise ConnectionError(f"cut off after {self._size():,} of {total:,} bytes")


def _open(url: str, start: int = 0) -> Any:
    headers = {"User-Agent": "esapn", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        raise


def _reason(error: BaseException) -> str:
    """Return what went wrong, without urllib's wrapping."""
    inner = getattr(error, "reason", None)
    if isinstance(inner, ssl.SSLCertVerificationError):
        return f"its certificate is not valid ({inner.verify_message})"
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code} {error.reason}"
    if isinstance(inner, OSError):
        return inner.strerror or str(inner)
    return str(error) or type(error).__name__


def _extract(dataset: Dataset, archive: Path, folder: Path) -> Path:
    """Unpack the ratings into `folder`; zipfile checks the CRC as it goes."""
    out = folder / PurePosixPath(dataset.member).name
    try:
        with zipfile.ZipFile(archive) as opened:
            if dataset.member not in opened.namelist():
                fail(dataset.name, f"{archive} holds no {dataset.member}")
            with opened.open(dataset.member) as member, out.open("wb") as file:
                shutil.copyfileobj(member, file, _PIECE)
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # bz2's own, and places outside the archive
            raise
        fail(dataset.name, f"{archive} is damaged: {error.strerror or error}")
    except _DAMAGE as error:
        fail(dataset.name, f"{archive} is damaged: {error or 'it ends too early'}")
    return out
