"""Replace: write several files into a folder, each whole or not at all, in a given order.

In: a folder and the files' bytes. Out: the folder. At any time, a kill or a power cut included, every file is the old
one or the new one. That files belong together is for who reads them to check.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..errors import ArtefactError, OptionError, shorten
from ..planning.options import check_flags

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# What drafts are called. They and what a caller names are all that is ever removed from a folder.
_DRAFT = ".se-surgery-"


def check_directory(directory: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """The folder as a path, if it can be written into.

    Raises:
        ArtefactError: It is a file, or it holds something and `overwrite` is not given.
        OptionError: It is no path.
    """
    check_flags(overwrite=overwrite)
    try:
        folder = Path(directory)
    except TypeError as error:
        raise OptionError(f"{shorten(directory)} is no path of a folder. Name a folder.") from error
    try:
        os.path.abspath(folder).encode()  # safetensors could not open another name
        held = sorted(os.listdir(folder))
    except FileNotFoundError:
        return folder
    except NotADirectoryError as error:
        raise ArtefactError(f"{str(folder)!r} is a file. Name a folder.") from error
    except (OSError, ValueError) as error:  # a zero byte in a name is a ValueError
        raise ArtefactError(f"{str(folder)!r} cannot be written ({error}). Name a folder that can.") from error
    found = [name for name in held if not name.startswith(_DRAFT)]
    if found and not overwrite:
        raise ArtefactError(
            f"{str(folder)!r} is not empty, {found[0]!r} is in it. Name another folder, or ask for overwrite."
        )
    return folder


def replace_files(
    directory: str | os.PathLike[str], files: Mapping[str, bytes], gone: Iterable[str] = (), *, overwrite: bool = True
) -> Path:
    """Write files into a folder, in the order given; other files in it stay.

    All are written under other names first and flushed to the disk; then each takes its place, and keeps the mode of
    what stood there. A link in its place is replaced, and what it points to left alone. One process writes at a time.

    Args:
        directory: The folder; it is made where it does not exist.
        files: What to write, by name.
        gone: What to remove when all is written, where it is there.
        overwrite: Whether the folder may hold something; another process may have filled it since it was looked at.

    Raises:
        ArtefactError: The folder may not or cannot be written. What was there stands, unless the message says
            otherwise.
    """
    folder, done = Path(directory), list[str]()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _flush(folder.parent)
        with _alone(folder), contextlib.ExitStack() as drafts:
            check_directory(folder, overwrite)
            written = {name: drafts.enter_context(_draft(folder / name, data)) for name, data in files.items()}
            for name, draft in written.items():
                os.replace(draft, folder / name)
                done.append(name)
                _flush(folder)
            for name in gone:
                (folder / name).unlink(missing_ok=True)
    except ArtefactError:
        raise
    except (OSError, ValueError) as error:
        new = f" {', '.join(done)} in it is new already." if done else ""
        raise ArtefactError(f"{str(folder)!r} cannot be written ({error}).{new} Name a folder that can.") from error
    return folder


@contextlib.contextmanager
def _draft(target: Path, data: bytes) -> Iterator[Path]:
    """A file next to `target` with these bytes on the disk; it is gone when the block ends, moved or not."""
    draft = target.with_name(f"{_DRAFT}{secrets.token_hex(4)}-{target.name}")
    mode = _mode(target)
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(data)
            if mode is not None:
                draft.chmod(mode)
            file.flush()
            os.fsync(file.fileno())
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _mode(target: Path) -> int | None:
    """The mode that a file has and will keep; None where there is none, or a link.

    Raises:
        OSError: Something else stands there.
    """
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return None
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise OSError(f"{target.name!r} in it is no file")
    return stat.S_IMODE(mode) if stat.S_ISREG(mode) else None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes of this library out of a folder, and remove what one that was killed has left there."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network filesystems have no locks; then drafts are left alone
            fcntl.flock(handle, fcntl.LOCK_EX)
            for draft in folder.glob(f"{_DRAFT}*"):
                draft.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


def _flush(folder: Path) -> None:
    """Have the disk know the new names; where a folder cannot be flushed (Windows), the file itself has been."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
