"""One owner at a time for the folder of a run."""

from __future__ import annotations

import logging
import os
import socket
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType

from filelock import SoftFileLease, Timeout

from lightning_prompts.errors import UserError, shortened
from lightning_prompts.runs.atomic_io import atomic_write

log = logging.getLogger(__name__)

LEASE = 60.0
"""Seconds after which an owner that gives no sign of life counts as dead; the same for all versions of this program."""
HEARTBEAT = 2.0
"""Seconds between signs of life, by which a second process learns that the first one works."""
PATIENCE = 10.0
"""Seconds until a second process says that it waits for a sign of life."""


class RunLock:
    """Holds the folder of a run for this process, and with it for all that share the search.

    The lock is a file that its owner touches every two seconds. It needs nothing of the file system but exclusive creation, so it
    works where `flock` is unknown or counts on one machine only. What is left by a process of this machine that was killed is taken
    over at once, and by one of another machine after a minute without a sign of life, measured by one's own clock.

    Args:
        folder: The run's folder, which is created if there is none.

    Raises:
        UserError: On entry, another process works in the folder.
        OSError: On entry, the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / ".lock"
        self.holder = folder / ".lock-holder"  # who it is, for those who are refused
        self._lease = SoftFileLease(self.path, lease_duration=LEASE, heartbeat_interval=HEARTBEAT)
        self._made = self._warned = False

    def __enter__(self) -> RunLock:
        self._made = not self.folder.exists()
        began, first = time.monotonic(), self._last_sign()
        told = False

        def works() -> bool:
            """Whether the owner has given a sign of life, or there is another owner."""
            nonlocal first, told
            now = self._last_sign()
            if first is None or now is None:
                first = now
            if not told and time.monotonic() - began > PATIENCE:
                told = True
                log.info(
                    "Waiting up to %d seconds to learn whether %s, which held %s, still works.",
                    LEASE,
                    self._who(),
                    self.folder,
                )
            return now != first

        try:
            try:
                self._lease.acquire(timeout=1.5 * LEASE, poll_interval=0.25, cancel_check=works)
            except Timeout:
                if self._last_sign() not in (None, first):
                    raise
                self.path.unlink(missing_ok=True)  # empty, as a power failure may leave it, and nobody's
                self._lease.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"The run folder {self.folder} is in use by {self._who()}; wait for it to end, stop it, or give another folder."
            ) from None
        except OSError:
            self._unmake()
            raise
        since = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z}"
        with suppress(OSError):
            atomic_write(self.holder, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._lease.is_locked:
            return
        taken = self.taken
        if not taken:
            with suppress(OSError):
                self.holder.unlink(missing_ok=True)
        with suppress(OSError):  # what is left is taken over by the next process
            self._lease.release()
        if not taken:
            self._unmake()

    def _unmake(self) -> None:
        """Delete the folder that this lock has created, if nothing was written."""
        if self._made:
            with suppress(OSError):
                self.folder.rmdir()

    @property
    def taken(self) -> bool:
        """Whether another process has taken over, since this one was suspended for longer than the lease."""
        return self._lease.compromise is not None and self.path.exists() and not self._lease.is_lock_held_by_us

    def check(self) -> None:
        """Make sure that the folder is still this process's.

        Raises:
            UserError: Another process has taken over.
        """
        if self._lease.compromise is None:
            return
        if self.taken:
            raise UserError(
                f"The run folder {self.folder} was taken over by {self._who()}, since this process had given no sign of life for "
                f"{LEASE:.0f} seconds; it ends here, and the other goes on."
            )
        if not self._warned:
            self._warned = True
            log.warning(
                "The lock of %s is lost (%s); start no other process there.", self.folder, self._lease.compromise.reason
            )

    def _last_sign(self) -> tuple[int, int] | None:
        """What changes with each sign of life, and with each owner."""
        try:
            there = self.path.stat()
        except OSError:
            return None
        return there.st_mtime_ns, there.st_ino

    def _who(self) -> str:
        try:
            return shortened(self.holder.read_text(errors="replace").strip(), 200) or "another process"
        except OSError:
            return "another process"
