"""Model folders under every fault: the old model or the new one, never a mix, and no code run.

Processes are killed in forked children: at every event of the file system that Python reports,
or by the kernel at the byte where a limit on file size is reached.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from exprgen._errors import CheckpointError, ReproducibilityWarning, UntrustedFileError
from exprgen._files import read_folder, write_folder
from exprgen._manifest import checksum, describe

resource = pytest.importorskip("resource", reason="needs fork and limits, as Unix has them")
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

KILLED = -signal.SIGKILL


def save(folder: Path, number: int = 1, **options) -> Path:
    payload = {
        "model_state_dict": {"w": torch.full((500,), float(number))},
        "attr_dict": {"history_": np.arange(5), "number": number},
    }
    options = {"manifest": {"class": "NBVAE", "number": number}} | options
    return write_folder(folder, payload=payload, **options)


def number(folder: Path, **options) -> int:
    """Load; the number it was saved with, which manifest and tensors must agree on."""
    manifest, payload = read_folder(folder, expected_class="NBVAE", **options)
    assert payload["attr_dict"]["number"] == manifest["number"]
    assert (payload["model_state_dict"]["w"] == manifest["number"]).all()
    return manifest["number"]


def spawn(action) -> int:
    """Run in a forked process, which exits with 0, or the number of the error it met."""
    child = os.fork()
    if child == 0:
        code = 255
        try:
            action()
            code = 0
        except FileExistsError:
            code = errno.EEXIST
        except OSError as error:
            code = error.errno or 255
        finally:
            os._exit(code)
    return child


def status(child: int) -> int:
    """How a process ended; negative if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_child(action) -> int:
    return status(spawn(action))


def hidden(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


def forge(folder: Path) -> None:
    """Make the manifest agree with whatever the files are now, as an attacker would."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["files"] = {name: describe(folder / name) for name in manifest["files"]}
    file.write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))


# ---------------------------------------------------------------------------- what should work


@pytest.mark.parametrize("name", ["model", "with space", "Zürich 細胞", "new/below/new"])
def test_round_trip(tmp_path, name):
    folder = save(tmp_path / name)
    manifest, payload = read_folder(str(folder), expected_class="NBVAE")
    assert folder == tmp_path / name
    assert sorted(os.listdir(folder)) == ["manifest.json", "model.pt"]
    assert manifest["format_version"] == "1.0"
    assert {"exprgen", "torch", "python"} <= manifest["versions"].keys()
    np.testing.assert_array_equal(payload["attr_dict"]["history_"], np.arange(5))
    assert torch.load(folder / "model.pt", weights_only=True)["attr_dict"]["number"] == 1
    assert read_folder(folder, expected_class=None)[0] == manifest


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert save("~/model") == tmp_path / "model"
    assert number("~/model") == 1


def test_overwrite_keeps_what_is_not_the_models(tmp_path):
    save(tmp_path, extra={"adata.h5ad": lambda file: file.write_bytes(b"cells")})
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "figures").mkdir()
    save(tmp_path, 2, overwrite=True)
    assert number(tmp_path) == 2
    assert sorted(os.listdir(tmp_path)) == ["figures", "manifest.json", "model.pt", "notes.txt"]


def test_without_overwrite_nothing_is_replaced(tmp_path):
    save(tmp_path)
    with pytest.raises(FileExistsError, match=r"not empty: 'manifest.json'.*overwrite=True"):
        save(tmp_path, 2)
    assert number(tmp_path) == 1


def test_prefixes_share_a_folder(tmp_path):
    save(tmp_path, 1, prefix="a_")
    save(tmp_path, 2, prefix="b_", overwrite=True)
    assert (number(tmp_path, prefix="a_"), number(tmp_path, prefix="b_")) == (1, 2)


def test_extra_files_are_verified_too(tmp_path):
    save(tmp_path, extra={"adata.h5ad": lambda file: file.write_bytes(b"cells")})
    (tmp_path / "adata.h5ad").write_bytes(b"celLs")
    with pytest.raises(CheckpointError, match="adata.h5ad"):
        number(tmp_path)


def test_a_folder_behind_a_link_stays_there(tmp_path):
    save(tmp_path / "disk")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    save(tmp_path / "link", 2, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert number(tmp_path / "disk") == 2


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "options",
    [
        {"manifest": {"class": object()}},
        {"extra": {"../evil": lambda file: file.write_text("")}},
        {"extra": {"manifest.json/x": lambda file: file.write_text("")}},
        {"prefix": "../"},
    ],
)
def test_what_cannot_be_saved_leaves_the_old_model(tmp_path, options):
    save(tmp_path / "model")
    with pytest.raises((TypeError, ValueError)):
        save(tmp_path / "model", 2, overwrite=True, **options)
    assert number(tmp_path / "model") == 1
    assert os.listdir(tmp_path) == ["model"]
    assert hidden(tmp_path / "model") == []


def test_an_object_in_the_payload_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"payload\['plan'\] is a object"):
        write_folder(tmp_path / "m", manifest={"class": "A"}, payload={"plan": object()})
    assert os.listdir(tmp_path) == []


def test_paths_that_are_no_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(NotADirectoryError, match="file"):
        save(file)
    with pytest.raises(NotADirectoryError, match="file"):
        number(file)
    assert file.read_text() == "mine"
    with pytest.raises(FileNotFoundError, match="absent"):
        number(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        number(tmp_path)
    with pytest.raises(ValueError, match="not a file name"):
        number(tmp_path, prefix="../")


@pytest.mark.parametrize("name", ["manifest.json", "model.pt"])
def test_a_missing_file_is_named(tmp_path, name):
    save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        number(tmp_path)


def test_another_class_is_named(tmp_path):
    save(tmp_path)
    with pytest.raises(CheckpointError, match="NBVAE, not a CondVAE"):
        read_folder(tmp_path, expected_class="CondVAE")


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({"format_version": "2.0"}, pytest.raises(CheckpointError, match="format 2.0.*Upgrade")),
        ({"versions": {"exprgen": "99.1.0"}}, pytest.warns(ReproducibilityWarning, match="99.1")),
        ({"format_version": "1.7"}, None),
    ],
)
def test_newer_versions(tmp_path, change, outcome):
    save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text()) | change
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    forge(tmp_path)
    if outcome is None:
        assert number(tmp_path) == 1
    else:
        with outcome:
            number(tmp_path)


# ------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize("name", ["manifest.json", "model.pt"])
@pytest.mark.parametrize(
    "damage", [lambda d: b"", lambda d: d[: len(d) // 2], lambda d: d[:-1], lambda d: d + b"x",
               lambda d: np.random.default_rng(0).bytes(len(d))]
)  # fmt: skip
def test_damage_is_named(tmp_path, name, damage):
    save(tmp_path)
    file = tmp_path / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=f"{name} is corrupted"):
        number(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "model.pt"])
def test_one_flipped_bit_is_noticed_wherever_it_is(tmp_path, name):
    save(tmp_path)
    file = tmp_path / name
    whole = file.read_bytes()
    for position in np.random.default_rng(0).choice(len(whole) * 8, 60, replace=False):
        data = bytearray(whole)
        data[position // 8] ^= 1 << (position % 8)
        file.write_bytes(data)
        if name == "manifest.json" and means_the_same(data, whole):
            continue
        with pytest.raises(CheckpointError, match=name):
            number(tmp_path)


def means_the_same(a: bytes, b: bytes) -> bool:
    """White space in a manifest says nothing."""
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


# ---------------------------------------------------------------------------- malicious files


class Evil:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


@pytest.mark.parametrize("layout", ["torch", "torch legacy", "pickle"])
@pytest.mark.parametrize("forged", [True, False])
def test_a_malicious_model_runs_no_code(tmp_path, layout, forged):
    folder, sentinel = save(tmp_path / "m"), tmp_path / "sentinel"
    with (folder / "model.pt").open("wb") as file:
        if layout == "pickle":
            pickle.dump(Evil(sentinel), file)
        else:
            torch.save(
                {"w": Evil(sentinel)}, file, _use_new_zipfile_serialization=layout == "torch"
            )
    if not forged:
        with pytest.raises(CheckpointError, match=r"model.pt is corrupted"):
            number(folder)
    else:
        forge(folder)
        message = r"asks for \w+\.system" if layout == "torch" else "is no archive"
        with pytest.raises(UntrustedFileError, match=rf"model\.pt {message}"):
            number(folder)
    assert not sentinel.exists()


def test_a_malicious_manifest_runs_no_code(tmp_path):
    folder, sentinel = save(tmp_path / "m"), tmp_path / "sentinel"
    (folder / "manifest.json").write_bytes(pickle.dumps(Evil(sentinel)))
    with pytest.raises(UntrustedFileError, match=r"manifest\.json is a pickle"):
        number(folder)
    assert not sentinel.exists()


def test_a_manifest_leads_nowhere_else(tmp_path):
    (tmp_path / "secret").write_text("mine")
    folder = save(tmp_path / "m")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../secret"] = describe(tmp_path / "secret")
    (folder / "manifest.json").write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))
    with pytest.raises(UntrustedFileError, match=r"\.\./secret"):
        number(folder)
    save(folder, 2, overwrite=True)  # which removes what the old manifest names
    assert (tmp_path / "secret").read_text() == "mine"


def test_what_was_made_up_is_no_model(tmp_path):
    folder = save(tmp_path)
    torch.save({"__kind__": "call", "function": "os.system"}, folder / "model.pt")
    forge(folder)
    with pytest.raises(CheckpointError, match="Unknown kind"):
        number(folder)
    with zipfile.ZipFile(folder / "model.pt", "w") as archive:
        archive.writestr("../../evil", "x")
    forge(folder)
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        number(folder)


def test_a_link_in_place_of_what_was_saved_is_not_followed(tmp_path):
    victim = save(tmp_path / "victim", 7)
    (victim / "notes.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in victim.iterdir()}
    for name in (".saved", ".saving"):
        folder = save(tmp_path / f"m{name}")
        (folder / name).symlink_to(victim)
        for action in (number, lambda folder: save(folder, 2, overwrite=True)):
            with pytest.raises(UntrustedFileError, match=rf"{name} is no folder"):
                action(folder)
        assert {file.name: file.read_bytes() for file in victim.iterdir()} == before
        (folder / name).unlink()
        assert number(folder) == 1


def _junk_manifest(saved: Path) -> None:
    (saved / "manifest.json").write_text("{}")


def _other_files(saved: Path) -> None:
    (saved / "notes.txt").write_text("not yours")


def _damaged_file(saved: Path) -> None:
    (saved / "model.pt").write_bytes(b"junk")


def _no_manifest(saved: Path) -> None:
    (saved / "manifest.json").unlink()


@pytest.mark.parametrize("spoil", [_junk_manifest, _other_files, _damaged_file, _no_manifest])
def test_what_was_saved_but_is_damaged_replaces_nothing(tmp_path, spoil):
    folder = save(tmp_path / "m", 1)
    (folder / "notes.txt").write_text("mine")
    for name in (".damaged", ".damaged1"):
        save(tmp_path / "other", 2).rename(folder / ".saved")
        spoil(folder / ".saved")
        assert (number(folder), number(folder)) == (1, 1)
        assert (folder / "notes.txt").read_text() == "mine"
        assert name in hidden(folder)
    save(tmp_path / "other", 2).rename(folder / ".saved")
    spoil(folder / ".saved")
    save(folder, 3, overwrite=True)
    assert number(folder) == 3
    (tmp_path / "alone").mkdir()
    (folder / ".damaged").rename(tmp_path / "alone" / ".saved")
    with pytest.raises(CheckpointError, match=r"alone/\.damaged is what .* damaged"):
        number(tmp_path / "alone")


@pytest.mark.parametrize(
    "change",
    [{"files": f} for f in ([], ["model.pt"], None, 3, {}, {"model.pt": 3}, {"model.pt": {}})]
    + [{"versions": v} for v in (3, None, {"exprgen": 3})]
    + [{"class": None}],
)
def test_a_manifest_that_says_nonsense(tmp_path, change):
    save(tmp_path)
    file = tmp_path / "manifest.json"
    manifest = json.loads(file.read_text()) | change
    file.write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))
    with pytest.raises(CheckpointError, match=r"manifest\.json is corrupted"):
        number(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "model.pt"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_no_file(tmp_path, name, make):
    save(tmp_path)
    (tmp_path / name).unlink()
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} is no file"):
        number(tmp_path)


@pytest.mark.parametrize(
    "payload",
    [
        [1, 2],
        torch.zeros(3),
        {"__kind__": ["array"]},
        {"__kind__": "array", "dtype": "|O", "shape": (1,), "bytes": torch.zeros(8)},
        {"__kind__": "array", "dtype": "<f8", "shape": (1,), "bytes": "text"},
        {"__kind__": "path"},
        {"__kind__": "range", "args": (), "name": []},
        {"__kind__": "defaultdict", "factory": "eval", "items": []},
    ],
)
def test_plain_types_that_nobody_has_written(tmp_path, payload):
    save(tmp_path)
    torch.save(payload, tmp_path / "model.pt")
    forge(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.pt is corrupted"):
        number(tmp_path)


# ---------------------------------------------------------------------- death and full disks


def _limit_file_size(size: int, *, deadly: bool) -> None:
    """From here on a write beyond ``size`` fails (a full disk), or kills the process."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("deadly", [True, False], ids=["killed", "disk full"])
@pytest.mark.parametrize("existing", [True, False])
def test_at_every_byte_the_old_model_survives(tmp_path, deadly, existing):
    size = max(file.stat().st_size for file in save(tmp_path / "measure").iterdir())
    for i, offset in enumerate(np.linspace(0, size - 1, 20, dtype=int)):
        folder = tmp_path / f"model{i}"
        if existing:
            save(folder, 1)

        def action(folder=folder, offset=int(offset)):
            _limit_file_size(offset, deadly=deadly)
            save(folder, 2, overwrite=True)

        assert in_child(action) == (-signal.SIGXFSZ if deadly else errno.EFBIG)
        if existing:
            assert number(folder) == 1
        elif not deadly:
            assert not folder.exists()
        else:
            with pytest.raises(FileNotFoundError):
                number(folder)
        save(folder, 3, overwrite=existing)  # what is left behind is in nobody's way
        assert number(folder) == 3
        assert hidden(folder) == []


def test_a_full_disk_is_explained(tmp_path):
    def full(file: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    save(tmp_path / "m")
    with pytest.raises(OSError, match=r"No space left.*nothing was saved, \d+ MB free.*/m'"):
        save(tmp_path / "m", 2, overwrite=True, extra={"adata.h5ad": full})
    assert number(tmp_path / "m") == 1
    assert hidden(tmp_path / "m") == []


def _die_at(event: int) -> None:
    """Kill this process at the given event of the file system."""
    left = [event]

    def hook(name: str, arguments: tuple) -> None:
        if name in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize("second", ["load", "save"])
def test_killed_at_every_step_it_is_the_old_model_or_the_new(tmp_path, second):
    cells = {"adata.h5ad": lambda file: file.write_bytes(b"cells")}
    seen = []
    for event in range(100):
        folder = save(tmp_path / f"model{event}", 1, extra=cells)
        (folder / "notes.txt").write_text("mine")

        def action(folder=folder, event=event):
            _die_at(event)
            save(folder, 2, overwrite=True)

        status = in_child(action)
        if second == "save":  # over what the dead have left
            save(folder, 3, overwrite=True)
            assert number(folder) == 3
        else:
            seen.append(number(folder))
            assert (folder / "adata.h5ad").exists() == (seen[-1] == 1)
            assert ".saved" not in hidden(folder)
        assert (folder / "notes.txt").read_text() == "mine"
        if status == 0:
            break
        assert status == KILLED
    assert event > 10
    if second == "load":
        assert seen == sorted(seen)  # one moment of saving
        assert set(seen) == {1, 2}
        assert seen.count(2) > 3  # of which several were interrupted moves


def test_a_load_killed_while_it_finishes_a_swap_is_finished_by_the_next(tmp_path):
    def interrupted(folder: Path) -> Path:
        save(folder, 1)
        other = save(folder.with_name("other"), 2, overwrite=True)
        other.rename(folder / ".saved")
        return folder

    for event in range(100):
        folder = interrupted(tmp_path / f"model{event}")
        status = in_child(lambda folder=folder, event=event: (_die_at(event), number(folder)))
        assert number(folder) == 2
        if status == 0:
            break
    assert event > 3


# -------------------------------------------------------------------------- other processes


def test_two_processes_saving_and_one_loading_never_mix(tmp_path):
    folder = save(tmp_path / "m", 0)

    def saver(first: int) -> None:
        for i in range(15):
            save(folder, first + i, overwrite=True)

    children = [spawn(lambda first=first: saver(first)) for first in (100, 200)]
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        number(folder)
    assert [status(child) for child in children] == [0, 0]
    assert number(folder) in (114, 214)


def test_of_two_processes_without_overwrite_one_saves(tmp_path):
    for i in range(5):
        folder = tmp_path / f"m{i}"
        children = [spawn(lambda f=folder, who=who: save(f, who)) for who in (1, 2)]
        ends = [status(child) for child in children]
        assert sorted(ends) == [0, errno.EEXIST]
        assert number(folder) == ends.index(0) + 1


@pytest.mark.skipif(os.geteuid() != 0, reason="drops root's rights")
def test_a_read_only_folder():
    base = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    base.chmod(0o755)
    try:
        save(base / "m")

        def as_nobody(action):
            def inner():
                os.setuid(65534)
                action()

            return in_child(inner)

        assert as_nobody(lambda: save(base / "m", 2, overwrite=True)) == errno.EACCES
        assert as_nobody(lambda: save(base / "new")) == errno.EACCES
        assert as_nobody(lambda: number(base / "m")) == 0
        assert os.listdir(base) == ["m"]
        assert sorted(os.listdir(base / "m")) == ["manifest.json", "model.pt"]
        assert number(base / "m") == 1
    finally:
        shutil.rmtree(base)
