"""The manifest of a model folder: what the model is, and sums to verify every file by.

Plain JSON: ``class`` and whatever else the model says of itself; ``format_version``, ``created``,
``versions`` of the packages that matter; ``files`` with the size and SHA-256 of each; and
``checksum``, the SHA-256 of all of that.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import warnings
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from exprgen._errors import CheckpointError, ReproducibilityWarning, UntrustedFileError, name_some

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "check_version",
    "checksum",
    "describe",
    "is_name",
    "new_manifest",
    "read_manifest",
    "verify",
]

FORMAT_VERSION = "1.0"
MANIFEST = "manifest.json"
PACKAGES = ("exprgen", "scvi-tools", "torch", "anndata", "numpy", "pandas")


def new_manifest(said: Mapping[str, Any]) -> dict[str, Any]:
    """Begin a manifest: what the model says of itself, and where and when that was.

    Raises
    ------
    TypeError
        If JSON cannot hold it.
    """
    return json.loads(json.dumps(dict(said))) | {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
    }


def is_name(name: str) -> bool:
    """Whether a name stays in its folder, on every system."""
    return bool(name) and not name.startswith(".") and not set(name) & set("/\\:\0")


def describe(file: Path) -> dict[str, Any]:
    """Describe a file, for the manifest."""
    with file.open("rb") as handle:
        sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    return {"size": file.stat().st_size, "sha256": sha256}


def checksum(manifest: Mapping[str, Any]) -> str:
    """Sum up a manifest, whatever its layout, without the sum itself."""
    body = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(file: Path) -> dict[str, Any]:
    """Read a manifest that this version understands and that is whole."""
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: {file.parent} holds no model of exprgen.")
    _check_is_file(file)
    data = file.read_bytes()
    if data[:1] == b"\x80" or data[:2] == b"PK":
        raise UntrustedFileError(f"{file} is a pickle or an archive in place of JSON; not read.")
    try:
        manifest = json.loads(data)
        major, ours = (
            int(v.partition(".")[0]) for v in (manifest["format_version"], FORMAT_VERSION)
        )
        found = checksum(manifest)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is corrupted: {len(data)} bytes, and no manifest. Take another copy."
        ) from error
    if major > ours:
        raise CheckpointError(
            f"{file} has format {manifest['format_version']}, this version reads "
            f"{FORMAT_VERSION}. Upgrade exprgen."
        )
    if manifest.get("checksum") != found:
        raise CheckpointError(f"{file} is corrupted: its checksum differs. Take another copy.")
    if not _is_complete(manifest):
        raise CheckpointError(
            f"{file} is corrupted: it does not say class, versions and files. Take another copy."
        )
    outside = [name for name in manifest["files"] if not is_name(name)]
    if outside:
        raise UntrustedFileError(f"{file} names files outside its folder: {name_some(outside)}.")
    return manifest


def _is_complete(manifest: Mapping[str, Any]) -> bool:
    """Whether what every manifest says is there, and of its type."""
    versions, files = manifest.get("versions"), manifest.get("files")
    return (
        isinstance(manifest.get("class"), str)
        and isinstance(versions, dict)
        and all(isinstance(release, str) for release in versions.values())
        and isinstance(files, dict)
        and all(
            isinstance(said, dict)
            and isinstance(said.get("size"), int)
            and isinstance(said.get("sha256"), str)
            for said in files.values()
        )
    )


def check_version(manifest: Mapping[str, Any]) -> None:
    """Warn if results may differ because a newer minor version has saved the model."""
    theirs, ours = manifest["versions"].get("exprgen", "0"), version("exprgen")
    if _minor(theirs) > _minor(ours):
        warnings.warn(
            f"The model was saved by exprgen {theirs}, this is {ours}: results may differ. "
            "Upgrade exprgen to have the same.",
            ReproducibilityWarning,
            stacklevel=4,
        )


def _minor(release: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d{1,9}", release)[:2]))


def verify(file: Path, wanted: Mapping[str, Any]) -> None:
    """Compare a file with its description."""
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing. Take another copy of the model.")
    _check_is_file(file)
    found = describe(file)
    if found["size"] != wanted["size"]:
        raise CheckpointError(
            f"{file} is corrupted: it has {found['size']} bytes, {wanted['size']} were saved. "
            "Take another copy of the model."
        )
    if found["sha256"] != wanted["sha256"]:
        raise CheckpointError(
            f"{file} is corrupted: its SHA-256 checksum differs from the one saved. Take another "
            "copy of the model."
        )


def _check_is_file(file: Path) -> None:
    """Refuse a folder, and a pipe, which would never end."""
    if not file.is_file():
        raise CheckpointError(f"{file} is no file. Take another copy of the model.")
