"""Fetch the packages that carry a domain's images. Nothing is installed, nothing of a package is run."""

import shutil
import subprocess
import tarfile
from pathlib import Path

TIMEOUT_S = 1800


class SourceError(RuntimeError):
    """A domain's images cannot be had on this machine; the message says why and what to do."""


def deb_folder(package: str, work: Path) -> Path:
    """Download a Debian package and unpack its files (no root needed).

    Args:
        package: name of the package in the machine's own apt sources.
        work: scratch folder; a package that is there already is not fetched again.

    Raises:
        SourceError: apt-get or dpkg is missing, or the package cannot be had.
    """
    folder = work / "deb" / package
    if folder.exists():
        return folder
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise SourceError(f"`{tool}` is not installed; {package} is a Debian package: use Debian or Ubuntu")
    download = _empty(work / "deb.download")
    hint = "if apt has no package lists yet, run `apt-get update` (as root) and try again"
    _run(["apt-get", "download", package], download, hint)
    unpacked = _empty(work / "deb.unpacked")
    for archive in download.glob("*.deb"):
        _run(["dpkg", "-x", str(archive), str(unpacked)], download, "is the disk full?")
    return _keep(unpacked, folder)


def npm_folder(package: str, version: str, work: Path) -> Path:
    """Download an npm package of exactly this version and unpack its files; no script of it runs.

    Args:
        package: name, with its scope if it has one.
        version: exact version, so that the images are the same next year.
        work: scratch folder; a package that is there already is not fetched again.

    Raises:
        SourceError: npm is missing, or the package cannot be had.
    """
    folder = work / "npm" / package.replace("/", "+")
    if folder.exists():
        return folder
    if shutil.which("npm") is None:
        raise SourceError(f"`npm` is not installed; {package} is an npm package: install Node.js with npm")
    download = _empty(work / "npm.download")
    hint = "is the network there, and does npm's registry setting point to a working registry?"
    _run(["npm", "pack", "--ignore-scripts", "--loglevel=error", f"{package}@{version}"], download, hint)
    unpacked = _empty(work / "npm.unpacked")
    for archive in download.glob("*.tgz"):
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(unpacked, filter="data")
        except tarfile.TarError as error:
            raise SourceError(f"npm package {package} {version} cannot be unpacked: {error}; fetch it again") from error
    return _keep(unpacked, folder)


def _run(command: list[str], folder: Path, hint: str) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise SourceError(f"`{' '.join(command)}` did not end within {TIMEOUT_S} s; {hint}") from None
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout or "nothing").strip().splitlines()
        errors = [line for line in lines if line.lower().startswith(("e:", "npm err"))]
        said = " ".join(errors[:2] or lines[-1:])
        raise SourceError(f"`{' '.join(command)}` failed, saying: {said}; {hint}") from None


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _keep(unpacked: Path, folder: Path) -> Path:
    if not any(unpacked.iterdir()):
        raise SourceError(f"the package {folder.name} was fetched but is empty; try again")
    folder.parent.mkdir(parents=True, exist_ok=True)
    return unpacked.rename(folder)
