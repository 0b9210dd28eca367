"""A folder that appears complete or not at all; `files.write_atomically` is the same for one small file.

It is written under a hidden temporary name beside its place, every file is synced, and one rename shows
it. A process killed on the way leaves that hidden folder and nothing else; the next run removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.files import sync


@contextlib.contextmanager
def folder(path: Path, needed: int) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an exception.

    Args:
        path: must not exist yet, or be an empty folder.
        needed: bytes about to be written; checked against the free space first.

    Raises:
        UserError: `path` exists, its parent does not or cannot be written, or the disk is full.
    """
    path = path.absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists; give another output, or remove it")
    parent = path.parent
    if not parent.is_dir():
        raise UserError(f"{path}: its folder {parent} does not exist; create it")
    _remove_abandoned(path)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"{path} needs {needed / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free; make room, "
            "or give another output"
        )
    partial = parent / f".{path.name}.partial-{socket.gethostname()}-{os.getpid()}"
    try:
        partial.mkdir()
        yield partial
        _sync_tree(partial)
        os.rename(partial, path)
        _sync_folder(parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"{path}: no space left while writing ({error.strerror}); nothing was kept; make room, "
                "or give another output"
            ) from error
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise UserError(f"{path} exists now; it was made while this ran") from error
        raise UserError(f"{path}: cannot be written: {error}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def copy(file: Path, to: Path) -> None:
    """Copy a file and sync the copy."""
    with file.open("rb") as source, to.open("wb") as target:
        shutil.copyfileobj(source, target)
        sync(target)


def _remove_abandoned(path: Path) -> None:
    """Remove what killed runs of this machine left for the same output."""
    prefix = f".{path.name}.partial-{socket.gethostname()}-"
    for found in path.parent.iterdir():
        pid = found.name.removeprefix(prefix)
        if found.name.startswith(prefix) and pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(found, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_tree(root: Path) -> None:
    for where, _, _ in os.walk(root):
        _sync_folder(Path(where))


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
