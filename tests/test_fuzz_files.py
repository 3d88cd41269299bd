"""A thousand corrupted model files: none runs code, none is loaded with other weights.

Damage is drawn at random, seeded: bytes flipped, files cut, parts swapped or repeated, members of
the archive replaced, the manifest edited. Whoever changes a file and its checksums has made
another model, of which only the first half can be asked: that nothing is executed.

An audit hook of Python sees what is executed, started or written while a file is loaded. It
cannot be removed, so that each class is tried in a forked process.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import MODELS, trained_on_all_roles

from exprgen._errors import CheckpointError
from exprgen._manifest import checksum, describe

pytest.importorskip("resource", reason="needs fork, as Unix has it")
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)

N_DAMAGED, N_FORGED = 170, 40
"""Per class: 1,020 damaged files, and 240 whose sums were made right."""

Rng = np.random.Generator

ALARMS = {
    "compile", "exec", "import", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.remove",
    "os.rename", "os.rmdir", "os.spawn", "os.system", "pty.spawn", "shutil.rmtree",
    "socket.connect", "subprocess.Popen", "urllib.Request",
}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


# -------------------------------------------------------------------------------- kinds of damage


def flip(data: bytes, rng: Rng) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(len(data), size=rng.integers(1, 9)):
        changed[place] ^= int(rng.integers(1, 256))
    return bytes(changed)


def cut(data: bytes, rng: Rng) -> bytes:
    return data[: rng.integers(len(data))]


def splice(data: bytes, rng: Rng) -> bytes:
    """A part is repeated elsewhere, over or between what was there."""
    start, to = np.sort(rng.integers(len(data), size=2))
    at = int(rng.integers(len(data)))
    return data[:at] + data[start:to] + data[at + int(rng.integers(2)) * int(to - start) :]


def noise(data: bytes, rng: Rng) -> bytes:
    at, n = int(rng.integers(len(data))), int(rng.integers(1, 200))
    return data[:at] + rng.bytes(n) + data[at + n :]


BYTES = (flip, cut, splice, noise)


class Evil:
    """What an attacker would have a pickle do."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.system, ("touch sentinel",)


def member(data: bytes, rng: Rng) -> bytes:
    """Replace, rename, repeat or drop a member of the archive, or damage what it holds."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    weights = np.array([20.0 if name.endswith(".pkl") else 1.0 for name, _ in members])
    i = int(rng.choice(len(members), p=weights / weights.sum()))
    name, held = members[i]
    evil = pickle.dumps({"model_state_dict": Evil()}, protocol=int(rng.integers(6)))
    edits: list[list[tuple[str, bytes]]] = [
        [(name, flip(held or b"\0", rng))],
        [(name, evil)],
        [(name, evil[:-1] + held)],
        [("../../evil", held), (name, held)],
        [("/" + name, held)],
        [],
        [(name, held), (name, rng.bytes(len(held) + 1))],
    ]
    members[i : i + 1] = edits[int(rng.integers(len(edits)))]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a name that is there twice
        for where, what in members:
            archive.writestr(where, what)
    return buffer.getvalue()


ODD: list[Any] = [
    None, True, -1, 0, 10**30, 1.5, "", "x", "../../etc/passwd", "/etc/passwd", "2.0", "1.9", [],
    ["model.pt"], {}, {"a": 1}, "os.system", "\0", "__class__",
]  # fmt: skip


def edit(manifest: dict[str, Any], rng: Rng) -> dict[str, Any]:
    """Put something odd in a random place, or take away what was there."""
    place: Any = manifest
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = keys[int(rng.integers(len(keys)))]
        if not (isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7):
            break
        place = place[key]
    if rng.random() < 0.2:
        del place[key]
    elif rng.random() < 0.2 and isinstance(place, dict):
        place[str(ODD[int(rng.integers(len(ODD)))])] = place[key]
    else:
        place[key] = ODD[int(rng.integers(len(ODD)))]
    return manifest


def forge(folder: Path, manifest: dict[str, Any] | None = None) -> None:
    """Make sums right: of all files, or of an edited manifest alone."""
    path = folder / "manifest.json"
    if manifest is None:
        manifest = json.loads(path.read_text())
        manifest["files"] = {name: describe(folder / name) for name in manifest["files"]}
    path.write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))


def damage(folder: Path, whole: dict[str, bytes], rng: Rng, *, forged: bool) -> None:
    """Spoil a model's folder in one way."""
    if forged:
        change = (member, member, *BYTES)[int(rng.integers(6))]
        (folder / "model.pt").write_bytes(change(whole["model.pt"], rng))
        forge(folder)
    elif rng.random() < 0.25:
        forge(folder, edit(json.loads(whole["manifest.json"]), rng))
    else:
        name = "manifest.json" if rng.random() < 0.3 else "model.pt"
        changes = BYTES if name == "manifest.json" else (*BYTES, member)
        change = changes[int(rng.integers(len(changes)))]
        (folder / name).write_bytes(change(whole[name], rng))


# ------------------------------------------------------------------------------------- the watch

alarms: list[str] | None = None


def hook(event: str, arguments: tuple) -> None:
    if alarms is None:
        return
    if event == "open":
        path, mode, flags = arguments
        if (mode and set(mode) & set("wax+")) or (flags or 0) & WRITING:
            alarms.append(f"open {path} {mode} {flags}")
    elif event in ALARMS:
        alarms.append(f"{event} {arguments}"[:200])


@contextmanager
def watch() -> Iterator[list[str]]:
    global alarms
    alarms = seen = []
    try:
        yield seen
    finally:
        alarms = None


def outcome_of(model_class: Any, folder: Path, saved: str) -> str:
    """What comes of loading a folder, in a word or as a fault."""
    with watch() as seen:
        try:
            model, said = model_class.load(folder), None
        except (CheckpointError, FileNotFoundError) as error:
            model, said = None, type(error).__name__
        except Exception as error:  # noqa: BLE001 - any other is a fault
            model, said = None, f"fault: {traceback.format_exception(error)[-1]}"
    if seen:
        return f"fault: {seen}"
    if model is None:
        return str(said)
    return "the same" if model._fingerprint() == saved else "another model"


def try_all(model: Any, folder: Path, seed: int) -> dict[str, int]:
    """Every damage to one model; how often what came of it."""
    sys.addaudithook(hook)
    warnings.simplefilter("ignore")
    model.save(folder)
    whole = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    for _ in range(2):  # what is imported when it is first used
        type(model).load(folder)
    found: Counter[str] = Counter()
    for i in range(N_DAMAGED + N_FORGED):
        forged = i >= N_DAMAGED
        damage(folder, whole, np.random.default_rng([seed, i]), forged=forged)
        what = outcome_of(type(model), folder, model._fingerprint())
        if what == "another model":
            what = "forged" if forged else "fault: other weights"
        found[f"{what} ({seed}, {i})" if what.startswith("fault") else what] += 1
        for name, data in whole.items():
            (folder / name).write_bytes(data)
    return found


@pytest.mark.parametrize("seed", range(len(MODELS)), ids=[m.__name__ for m in MODELS])
def test_corrupted_files(tmp_path, seed, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a sentinel would lie
    model, report = trained_on_all_roles(MODELS[seed]), tmp_path / "found.json"
    child = os.fork()
    if child == 0:
        try:
            report.write_text(json.dumps(try_all(model, tmp_path / "model", seed)))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    found = json.loads(report.read_text())
    assert sum(found.values()) == N_DAMAGED + N_FORGED
    assert [what for what in found if what.startswith("fault")] == []
    assert not (tmp_path / "sentinel").exists()
    assert found["CheckpointError"] > N_DAMAGED / 2
    assert found["UntrustedFileError"] > 5


@pytest.mark.parametrize(
    "action",
    [
        lambda path: os.system("true"),
        lambda path: exec("1"),
        lambda path: (path / "new").write_text("x"),
        lambda path: pickle.loads(pickle.dumps(Evil())),
    ],
    ids=["system", "exec", "write", "pickle"],
)
def test_what_the_watch_notices(tmp_path, action, monkeypatch):
    monkeypatch.chdir(tmp_path)
    child = os.fork()
    if child == 0:
        sys.addaudithook(hook)
        with watch() as seen:
            action(tmp_path)
        os._exit(len(seen))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) > 0
