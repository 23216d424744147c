"""PostgreSQL refuses to run as root: whom it runs as then, and how it reaches its files.

Nothing outside the data directory is changed for that: see docs/decisions/0062-no-doors-opened.md.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

CANDIDATES = ("nobody", "postgres", "daemon")
"""Accounts that exist nearly everywhere. Borrowing one leaves the machine's list of users alone."""


@dataclass(frozen=True)
class Account:
    """A user of the operating system."""

    name: str
    uid: int
    gid: int


_PR_SET_KEEPCAPS = 8
_PR_SET_SECUREBITS = 28
_SECBIT_NO_SETUID_FIXUP = 4
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_LINUX_CAPABILITY_VERSION_3 = 0x20080522


class Capability(IntEnum):
    """A part of root's rights (capabilities(7)), by its number."""

    DAC_OVERRIDE = 1
    """Reading, writing and running whatever the modes of files say."""
    DAC_READ_SEARCH = 2
    """Reading files and entering directories whatever their modes say."""
    SETPCAP = 8
    """Saying how capabilities are counted; needed on the way only."""


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


def capability_for(account: Account, program: Path, data: Path) -> Capability | None:
    """What `account` needs to run `program` on `data` where they are; None: nothing, the way is open to it.

    Below a directory that only its owner may enter (`/root`, our own data directory) it would reach neither. Opening
    such a directory would open it to everybody, and for longer than we run; so the process gets the right instead.

    Raises:
        LookupError: it cannot reach them, and that right is not ours to give; the message says what is closed.
    """
    to_program, to_data = (
        [folder for folder in path.resolve().parents if not _may(account, folder, stat.S_IXUSR)]
        for path in (program, data)
    )
    closed = [*to_program, *to_data]
    runs = _may(account, program, stat.S_IRUSR | stat.S_IXUSR)
    if not closed and runs:
        return None
    if (to_program or not runs) and not _has(Capability.SETPCAP):
        raise LookupError(f"user {account.name} cannot enter {to_program[0] if to_program else program}")
    # The smaller right does not cover running what is not marked as a program for the account.
    wanted = [Capability.DAC_READ_SEARCH, Capability.DAC_OVERRIDE] if runs else [Capability.DAC_OVERRIDE]
    for capability in wanted:
        if _has(capability):
            return capability
    raise LookupError(f"user {account.name} cannot enter {closed[0] if closed else program}")


def keep_capabilities(keep: bool) -> None:
    """Whether a child of this thread that changes its user keeps its capabilities until it runs its program."""
    ctypes.CDLL(None).prctl(_PR_SET_KEEPCAPS, int(keep), 0, 0, 0)


def reduction_to(capability: Capability) -> Callable[[], None]:
    """What a child runs, after it has changed its user, to have this capability and no other, also past `exec`."""
    libc = ctypes.CDLL(None, use_errno=True)  # here: a forked child of a threaded process must not load anything
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    # Effective, permitted, inheritable; twice, for the lower and the upper 32.
    only = (ctypes.c_uint32 * 6)(*[1 << capability] * 3, 0, 0, 0)
    with_setpcap = (ctypes.c_uint32 * 6)(*[1 << capability | 1 << Capability.SETPCAP] * 3, 0, 0, 0)
    may_say_how = _has(Capability.SETPCAP)

    def reduce() -> None:
        failed = 0
        if may_say_how:
            # PostgreSQL's programs look for each other with access(2), which counts no capability of a user other
            # than root, unless it is told to.
            failed = libc.capset(header, with_setpcap) or libc.prctl(
                _PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP, 0, 0, 0
            )
        failed = (
            failed
            or libc.capset(header, only)
            or libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, int(capability), 0, 0)
        )
        if failed:
            raise OSError(ctypes.get_errno(), "the kernel does not pass on a capability")

    return reduce


def _has(capability: Capability) -> bool:
    return bool(_permitted() >> capability & 1)


def _permitted() -> int:
    """The capabilities that we have and may pass on, a bit each; 0 where there is no such thing."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    found = dict(re.findall(r"^(Cap\w+):\s*([0-9a-f]+)$", status, flags=re.MULTILINE))
    return int(found.get("CapPrm", "0"), 16) & int(found.get("CapBnd", "0"), 16)


def _may(account: Account, path: Path, owner_bits: int) -> bool:
    return _allows(account, path.stat(), owner_bits)


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
