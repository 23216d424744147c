"""PostgreSQL refuses to run as root: whom it runs as then, and how it reaches its files."""

from __future__ import annotations

import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

CANDIDATES = ("nobody", "postgres", "daemon")
"""Accounts that exist nearly everywhere. Borrowing one leaves the machine's list of users alone."""


@dataclass(frozen=True)
class Account:
    """A user of the operating system."""

    name: str
    uid: int
    gid: int


def account_for(data: Path) -> Account | None:
    """The account for a server whose files are in `data`; None: the one we have.

    Raises:
        LookupError: we are root, and there is nobody else.
    """
    if os.geteuid() != 0:
        return None
    if data.exists() and (owner := data.stat()).st_uid != 0:
        # An earlier run chose, perhaps as an ordinary user: its files decide.
        return Account(_name(owner.st_uid), owner.st_uid, owner.st_gid)
    for name in CANDIDATES:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    raise LookupError(f"none of the users {', '.join(CANDIDATES)} exists")


def owner_of(path: Path) -> str:
    """Name of the user who owns `path`."""
    return _name(path.stat().st_uid)


def open_way(account: Account, path: Path) -> list[Path]:
    """Let `account` walk down to `path`; the directories that had to be changed.

    Below a directory only its owner may enter (`/root`, `mktemp -d`) the server would reach neither its program nor
    its data. Others get the right to pass through, not to list or to read: who does not know a name below still
    finds nothing.
    """
    opened = []
    for folder in reversed(path.resolve().parents):
        status = folder.stat()
        if not _allows(account, status, stat.S_IXUSR):
            folder.chmod(stat.S_IMODE(status.st_mode) | stat.S_IXOTH)
            opened.append(folder)
    return opened


def open_tree(account: Account, root: Path) -> None:
    """Let `account` read a directory of programs that was installed under a strict umask."""
    for path in (root, *root.rglob("*")):
        status = path.stat()
        wanted = stat.S_IRUSR | (status.st_mode & stat.S_IXUSR)
        if not _allows(account, status, wanted):
            path.chmod(stat.S_IMODE(status.st_mode) | wanted >> 6)


def readable(account: Account, path: Path) -> bool:
    """Whether `account` may read (and enter or run) `path` itself."""
    status = path.stat()
    return _allows(account, status, stat.S_IRUSR | (status.st_mode & stat.S_IXUSR))


def _allows(account: Account, status: os.stat_result, owner_bits: int) -> bool:
    """Whether the mode gives `account` what `owner_bits` would give the owner."""
    if status.st_uid == account.uid:
        wanted = owner_bits
    elif status.st_gid == account.gid:
        wanted = owner_bits >> 3
    else:
        wanted = owner_bits >> 6
    return status.st_mode & wanted == wanted


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
