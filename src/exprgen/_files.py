"""Model folders: whole or as before, verified, and read without running code.

A folder holds ``manifest.json``, what the model is, in words; ``model.pt``, its tensors and plain
types; and perhaps more files, such as the cells. The manifest knows size and SHA-256 of each of
them, and its own.

*Whole.* All files are written, and synced to the disk, in a hidden folder ``.saving`` next to
those they will replace. One rename of it to ``.saved`` is the moment of saving: until then the old
model is untouched, from then on the new one counts, and its files are moved into place. Should
the process die meanwhile, whoever next reads or saves verifies what it left and finishes the move;
a ``.saved`` that is damaged is renamed and replaces nothing. Files of other names are never
touched. A lock on the folder keeps processes apart; it is freed with the process.

*Verified.* What is read is first compared with the manifest: kind of model, format, sizes, sums.

*No code.* ``model.pt`` is read by ``torch.load(weights_only=True)``, the manifest is JSON, and no
name in either leads out of the folder.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import re
import shutil
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from exprgen._errors import CheckpointError, UntrustedFileError, name_some
from exprgen._manifest import (
    MANIFEST,
    check_version,
    checksum,
    describe,
    is_name,
    new_manifest,
    read_manifest,
    verify,
)
from exprgen._plain import from_plain, to_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["from_plain", "read_folder", "to_plain", "write_folder"]

logger = logging.getLogger("exprgen")

MODEL = "model.pt"


def write_folder(
    path: str | os.PathLike[str],
    *,
    manifest: Mapping[str, Any],
    payload: Mapping[str, Any],
    overwrite: bool = False,
    extra: Mapping[str, Callable[[Path], object]] | None = None,
    prefix: str = "",
) -> Path:
    """Save a model: all of it, or nothing.

    Parameters
    ----------
    path
        The folder; it is made, with those above it, if need be. ``~`` is the home folder.
    manifest
        JSON-able, with at least ``"class"``. Format, versions, date and files are added.
    payload
        The contents of ``model.pt``, whatever :func:`to_plain` takes.
    overwrite
        Whether to replace a model that is there. Other files in the folder stay in any case.
    extra
        Further files: functions that write a file, by its name.
    prefix
        Put before the name of every file, so that one folder can hold several models.

    Returns
    -------
    pathlib.Path
        The folder, absolute.

    Raises
    ------
    TypeError
        If ``manifest`` or ``payload`` holds what a file cannot.
    FileExistsError
        If the folder is not empty and ``overwrite`` is False.
    OSError
        If it cannot be written (no permission, disk full, path is a file): nothing has changed.
    UntrustedFileError
        If a link stands where the new files would be collected.
    """
    folder = _folder(path)
    buffer = io.BytesIO()
    torch.save(to_plain(dict(payload), where="payload"), buffer)
    writers: dict[str, Callable[[Path], object]] = {
        f"{prefix}{name}": writer for name, writer in (extra or {}).items()
    }
    writers[f"{prefix}{MODEL}"] = lambda file: file.write_bytes(buffer.getbuffer())
    body = new_manifest(manifest)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _finish(folder, prefix)
        _check_free(folder, [*writers, f"{prefix}{MANIFEST}"], overwrite)
        saving = folder / f".{prefix}saving"
        shutil.rmtree(saving, ignore_errors=True)  # what a process that died has left
        try:
            saving.mkdir()
            body["files"] = {name: _write(saving / name, write) for name, write in writers.items()}
            body["checksum"] = checksum(body)
            text = json.dumps(body, indent=1, ensure_ascii=False)
            _write(saving / f"{prefix}{MANIFEST}", lambda file: file.write_text(text, "utf-8"))
            _sync(saving)
            saved = saving.replace(folder / f".{prefix}saved")
        except BaseException as error:
            shutil.rmtree(saving, ignore_errors=True)
            free = shutil.disk_usage(folder).free
            with suppress(OSError):  # not empty, if another process has come first
                if is_new:
                    folder.rmdir()
            if isinstance(error, OSError):
                reason = f"{error.strerror or error}; nothing was saved, {free / 1e6:.0f} MB free"
                raise OSError(error.errno, reason, str(folder)) from error
            raise
        _sync(folder)
        _move(saved, folder, prefix, body)
    _sync(folder.parent)
    return folder


def read_folder(
    path: str | os.PathLike[str],
    *,
    expected_class: str | None,
    map_location: str | torch.device = "cpu",
    prefix: str = "",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a model that :func:`write_folder` has saved, after verifying all of it.

    Parameters
    ----------
    path, prefix
        As they were given to :func:`write_folder`.
    expected_class
        What ``manifest["class"]`` must be; None for anything.
    map_location
        Device to put the tensors on, wherever they were saved from.

    Returns
    -------
    manifest, payload
        As they were given to :func:`write_folder`; the manifest with what was added.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        If there is no such folder, or a file of the model is missing.
    ValueError
        If ``prefix`` cannot begin the name of a file.
    CheckpointError
        If a file is damaged, or the model is of another class or of a newer format.
    UntrustedFileError
        If a file would run code when read, or names files elsewhere.

    Warns
    -----
    ReproducibilityWarning
        If a newer version of exprgen has saved the model.
    """
    folder, model = _folder(path), f"{prefix}{MODEL}"
    if not is_name(model):
        raise ValueError(f"{model!r} is not a file name.")
    if not folder.exists():
        raise FileNotFoundError(f"There is no folder {folder}.")
    with _locked(folder):
        damage = _finish(folder, prefix)
        file = folder / f"{prefix}{MANIFEST}"
        if damage is not None and not file.exists():
            raise damage
        manifest = read_manifest(file)
        saved_class = manifest.get("class")
        if expected_class not in (None, saved_class):
            raise CheckpointError(
                f"{folder} holds a {saved_class}, not a {expected_class}. Load it by "
                f"{saved_class}.load(...)."
            )
        check_version(manifest)
        if model not in manifest["files"]:
            raise CheckpointError(f"{file} is corrupted: it does not name {model}.")
        for name, wanted in manifest["files"].items():
            verify(folder / name, wanted)
        payload = _load(folder / model, map_location)
    return manifest, payload


def _folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a model needs a folder.")
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder; wait for one that is in it."""
    if os.name == "nt":  # folders cannot be opened there; filelock comes with torch
        from filelock import FileLock

        with FileLock(folder / ".lock"):
            yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _finish(folder: Path, prefix: str) -> CheckpointError | None:
    """Move what has been saved into place, if another has left off; else say what is wrong.

    Raises
    ------
    UntrustedFileError
        If a link stands where files are collected: it could lead to files of others.
    """
    saving, saved = folder / f".{prefix}saving", folder / f".{prefix}saved"
    for place in (saving, saved):
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            raise UntrustedFileError(f"{place} is no folder, and was not followed. Remove it.")
    if not saved.exists():
        return None
    if not os.listdir(saved):  # the last step was missing
        saved.rmdir()
        return None
    try:
        manifest = _verified(saved, folder, prefix)
    except (CheckpointError, FileNotFoundError) as error:
        return _set_aside(saved, prefix, error)
    _move(saved, folder, prefix, manifest)
    return None


def _verified(saved: Path, folder: Path, prefix: str) -> dict[str, Any]:
    """Read the manifest of what was saved, and verify it; some files may have been moved."""
    manifest = read_manifest(saved / f"{prefix}{MANIFEST}")
    names = manifest["files"].keys()
    if others := set(os.listdir(saved)) - {*names, f"{prefix}{MANIFEST}"}:
        raise CheckpointError(f"{saved} holds files of no model: {name_some(sorted(others))}.")
    for name in names:
        at = saved / name
        verify(at if os.path.lexists(at) else folder / name, manifest["files"][name])
        if (folder / name).is_dir():
            raise CheckpointError(f"{folder / name} is a folder; a file is to be moved there.")
    return manifest


def _set_aside(saved: Path, prefix: str, error: Exception) -> CheckpointError:
    """Rename a damaged ``.saved``, so that it replaces nothing, now or later."""
    free = (saved.with_name(f".{prefix}damaged{i or ''}") for i in count())
    place = next(path for path in free if not os.path.lexists(path))
    try:
        saved.rename(place)
    except OSError:  # a folder that may only be read
        place = saved
    message = f"{place} is what a process that died has left, and it is damaged: {error}"
    logger.warning("%s It was ignored.", message)
    return CheckpointError(f"{message} There is no other model in {saved.parent}.")


def _move(saved: Path, folder: Path, prefix: str, manifest: Mapping[str, Any]) -> None:
    """Move verified files into place, the manifest last."""
    new, old = saved / f"{prefix}{MANIFEST}", folder / f"{prefix}{MANIFEST}"
    names = manifest["files"].keys()
    with suppress(FileNotFoundError, CheckpointError):  # a damaged one is replaced all the same
        for name in read_manifest(old)["files"].keys() - names:
            if not (folder / name).is_dir():
                (folder / name).unlink(missing_ok=True)
    for name in names:
        if os.path.lexists(saved / name):
            os.replace(saved / name, folder / name)
    _sync(folder)
    os.replace(new, old)
    saved.rmdir()
    _sync(folder)


def _check_free(folder: Path, names: list[str], overwrite: bool) -> None:
    """Refuse names that lead elsewhere, a folder in a file's place, a folder that is in use."""
    for name in names:
        if not is_name(name):
            raise ValueError(f"{name!r} is not a file name.")
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{folder / name} is a folder; a file is to be written there.")
    present = [name for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    if present and not overwrite:
        raise FileExistsError(
            f"{folder} is not empty: {name_some(present)}. Choose another folder, or replace the "
            "model in it by overwrite=True."
        )


def _write(file: Path, write: Callable[[Path], object]) -> dict[str, Any]:
    """Write one file down to the disk, and describe it."""
    write(file)
    _sync(file)
    return describe(file)


def _sync(path: Path) -> None:
    """Wait until a file is on the disk; a folder too, where the system can."""
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _load(file: Path, map_location: str | torch.device) -> dict[str, Any]:
    """Read tensors and plain types, and nothing else."""
    if not zipfile.is_zipfile(file):  # a bare pickle is one too many ways to read a file
        raise UntrustedFileError(f"{file} is no archive of tensors, and was not read.")
    try:
        payload = from_plain(torch.load(file, map_location=map_location, weights_only=True))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks for {found[1]}" if found else "is no plain model file"
        raise UntrustedFileError(
            f"{file} {what}: reading it could run code, and it was not read. Take the model from "
            "whom you trust."
        ) from error
    except _MADE_UP as error:
        raise CheckpointError(f"{file} is corrupted: {error}") from error
    if not isinstance(payload, dict):
        raise CheckpointError(f"{file} is corrupted: it holds a {type(payload).__name__}.")
    return payload


_MADE_UP = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
)
"""What comes of reading plain types that nobody has written."""
