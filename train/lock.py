"""One run at a time writes a folder: a lease that shows its owner, on any shared file system.

The lock is a file `lock.<number>` that names host, process and time. Its owner touches it every few
seconds. It is stale if

- it was released, or
- its owner was on this host and is gone (no such process, or one that began later), or
- it was not touched for `LEASE` seconds, by the clock of the file system.

Clocks of hosts are never compared: both times are the file server's, for the second is that of a
file made just now. A stale lock is not removed but outbid, by creating the next number, which only
one process can do; the highest number counts. An owner that was thought dead and wakes up (a
suspended machine, a network that was away) sees the higher number, or that its own lease has run
out, and stops before it writes. `flock` would not do: some shared file systems keep it to one host,
others have none.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

LEASE = 120.0
"""Seconds without a touch after which an owner on another host counts as dead. Network file systems
show a touch up to a minute late."""

BEAT = 15.0
"""Seconds between two touches."""


class LockLostError(RuntimeError):
    """Another run took the folder over; this one must not write there any more."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        host: its name.
        pid: the process.
        since: UTC, for people.
        job: of the scheduler, for people; empty if there is none.
        machine: what a process number is unique in: this boot of the host, this PID namespace.
        started: when the process began, in ticks of that boot: process numbers come again.
        released: the owner ended in good order.
    """

    host: str
    pid: int
    since: str
    job: str
    machine: str
    started: int | None
    released: bool = False

    @classmethod
    def me(cls) -> Owner:
        """This process."""
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        job = os.environ.get("SLURM_JOB_ID") or os.environ.get("JOBSET_NAME") or ""
        return cls(socket.gethostname(), os.getpid(), since, job, _machine(), _started(os.getpid()))

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"host {self.host}, pid {self.pid}{job}, since {self.since}"

    def is_gone(self) -> bool | None:
        """Whether the process has ended; None if that cannot be seen from here."""
        if self.released:
            return True
        if not self.machine or self.machine != _machine():
            return None
        return _started(self.pid) != self.started


class Lock:
    """Holds a folder for this process while the block runs.

    Args:
        folder: made if absent.
        what: the folder's name in messages.
        tell: receives a line when it waits to see whether another owner lives.
        lease, beat: as `LEASE` and `BEAT`.

    Raises:
        ValueError: another run is at work there; names its host, process and time. Or the folder
            cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        what: str = "folder",
        tell: Callable[[str], None] = lambda line: None,
        *,
        lease: float = LEASE,
        beat: float = BEAT,
    ):
        self.folder, self.what, self.tell = folder, what, tell
        self.lease, self.beat = lease, beat
        self._mine = Owner.me()
        self._number = 0
        self._touched = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run-lock", daemon=True)

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{self.what} cannot be made a folder ({error.strerror}); choose another"
            ) from error
        while True:
            newest = self._newest()
            if newest:
                self._outlive(newest)
            if self._take(newest + 1):
                break
        for number in self._numbers():
            if number < self._number:
                self._path(number).unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            # Kept as a released lock: numbers must only grow.
            self._write(self._path(self._number), Owner(**{**asdict(self._mine), "released": True}))

    def check(self) -> None:
        """To be called before writing what another run could be writing too.

        Raises:
            LockLostError: the folder is no longer this run's.
        """
        newest = self._newest()
        if newest > self._number:
            owner = self._read(newest)
            raise LockLostError(
                f"{self.what} was taken over by another run ({owner or 'unknown'}), because this "
                f"one did not touch {self._path(self._number).name} for {self.lease:.0f} s; "
                "nothing more is written"
            )
        late = _clock() - self._touched
        if late > self.lease:
            raise LockLostError(
                f"{self.what}: {self._path(self._number)} could not be touched for {late:.0f} s, "
                "another run may hold the folder now; nothing more is written"
            )

    # --- taking it ---

    def _outlive(self, number: int) -> None:
        """Returns when the lock is stale.

        Raises:
            ValueError: its owner lives.
        """
        owner = self._read(number)
        gone = owner.is_gone() if owner else None
        if gone is False:
            raise self._held(owner)
        if gone:
            return
        first = self._age(number)
        if first is None:
            return
        age, touched = first
        if age < self.lease:
            self.tell(
                f"{self.what} was in use by another run ({owner or 'unknown'}) {age:.0f} s ago: "
                f"waiting up to {self.lease - age:.0f} s for a sign of it"
            )
        while age < self.lease:
            time.sleep(min(self.beat / 4, self.lease - age + 0.01))
            seen = self._age(number)
            if seen is None:  # outbid meanwhile
                return
            if seen[1] != touched:
                owner = self._read(number)
                if owner and owner.released:
                    return
                raise self._held(owner)
            age = seen[0]

    def _held(self, owner: Owner | None) -> ValueError:
        return ValueError(
            f"{self.what}: another run is at work there ({owner or 'unknown'}); wait for it, end "
            "it, or choose another folder"
        )

    def _age(self, number: int) -> tuple[float, int] | None:
        """Seconds since the last touch and its time, both by the file system's clock."""
        probe = self.folder / f".now-{secrets.token_hex(4)}"
        try:
            # Opened anew: that is when a network file system asks its server.
            with self._path(number).open("rb") as file:
                touched = os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None
        try:
            probe.write_bytes(b"")
            now = probe.stat().st_mtime_ns
        finally:
            probe.unlink(missing_ok=True)
        return (now - touched) / 1e9, touched

    def _take(self, number: int) -> bool:
        path = self._path(number)
        try:
            with path.open("x") as file:
                json.dump(asdict(self._mine), file)
        except FileExistsError:
            return False
        self._number, self._touched = number, _clock()
        if self._newest() > number:  # who was slow may find a number free that is long outbid
            path.unlink(missing_ok=True)
            return False
        return True

    # --- keeping it ---

    def _keep(self) -> None:
        while not self._stop.wait(self.beat):
            before = _clock()
            with contextlib.suppress(OSError):  # tried again; `check` sees how long it has failed
                os.utime(self._path(self._number))
                self._touched = before

    # --- files ---

    def _path(self, number: int) -> Path:
        return self.folder / f"lock.{number}"

    def _numbers(self) -> list[int]:
        found = (path.suffix[1:] for path in self.folder.glob("lock.*"))
        return [int(text) for text in found if text.isdigit()]

    def _newest(self) -> int:
        return max(self._numbers(), default=0)

    def _read(self, number: int) -> Owner | None:
        """None if it is being written, or gone."""
        try:
            return Owner(**json.loads(self._path(number).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def _write(self, path: Path, owner: Owner) -> None:
        draft = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        draft.write_text(json.dumps(asdict(owner)))
        draft.rename(path)


def _clock() -> float:
    """Seconds, those asleep included: a suspended machine must notice."""
    name = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if name is None else time.clock_gettime(name)


def _machine() -> str:
    """Empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
