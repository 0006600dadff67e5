"""Lock the folder of a run, so that one process owns it at a time."""

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
"""Seconds without a heartbeat after which an owner counts as dead; the same in all versions of this program."""
HEARTBEAT = 2.0
"""Seconds between heartbeats, which show a second process that the first one is alive."""
PATIENCE = 10.0
"""Seconds until a second process logs that it waits for a heartbeat."""


class RunLock:
    """Lock the folder of a run for this process and the ranks that share its search.

    The lock is a file that its owner touches every two seconds. The file system only has to support exclusive creation,
    so the lock works where `flock` is missing or works on one machine only. The lock of a killed process of this
    machine is taken over at once; that of another machine after a minute without a heartbeat, measured by this
    machine's clock.

    Args:
        folder: The run's folder, which is created if it is missing.

    Raises:
        UserError: On entry, another process owns the folder.
        OSError: On entry, the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / ".lock"
        self.holder = folder / ".lock-holder"  # names the owner, for the message to a process that is refused
        self._lease = SoftFileLease(self.path, lease_duration=LEASE, heartbeat_interval=HEARTBEAT)
        self._created = self._warned = False

    def __enter__(self) -> RunLock:
        self._created = not self.folder.exists()
        began, first = time.monotonic(), self._heartbeat()
        announced = False

        def owner_is_alive() -> bool:
            """Return whether there was a heartbeat or a change of owner since the first look."""
            nonlocal first, announced
            now = self._heartbeat()
            if first is None or now is None:
                first = now
            if not announced and time.monotonic() - began > PATIENCE:
                announced = True
                log.info(
                    "Waiting up to %d seconds for a sign that %s, which locked %s, is alive.",
                    LEASE,
                    self._owner(),
                    self.folder,
                )
            return now != first

        try:
            try:
                self._lease.acquire(timeout=1.5 * LEASE, poll_interval=0.25, cancel_check=owner_is_alive)
            except Timeout:
                if self._heartbeat() not in (None, first):
                    raise
                self.path.unlink(missing_ok=True)  # empty, as after a power failure, and without an owner
                self._lease.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"The run folder {self.folder} is in use by {self._owner()}; wait for it to end, stop it, or give "
                "another folder."
            ) from None
        except OSError:
            self._remove_created()
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
        with suppress(OSError):  # the next process takes over what is left
            self._lease.release()
        if not taken:
            self._remove_created()

    def _remove_created(self) -> None:
        """Delete the folder if this lock created it and it is empty."""
        if self._created:
            with suppress(OSError):
                self.folder.rmdir()

    @property
    def taken(self) -> bool:
        """Whether another process took over because this one was suspended for longer than the lease."""
        return self._lease.compromise is not None and self.path.exists() and not self._lease.is_lock_held_by_us

    def check(self) -> None:
        """Make sure that this process still owns the folder.

        Raises:
            UserError: Another process took over.
        """
        if self._lease.compromise is None:
            return
        if self.taken:
            raise UserError(
                f"The run folder {self.folder} was taken over by {self._owner()}, since this process had no heartbeat "
                f"for {LEASE:.0f} seconds; this process ends, and the other continues."
            )
        if not self._warned:
            self._warned = True
            log.warning(
                "The lock of %s is lost (%s); do not start another process in this folder.",
                self.folder,
                self._lease.compromise.reason,
            )

    def _heartbeat(self) -> tuple[int, int] | None:
        """Return a value that changes with each heartbeat and each owner; None without a lock file."""
        try:
            stat = self.path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_ino

    def _owner(self) -> str:
        try:
            return shortened(self.holder.read_text(errors="replace").strip(), 200) or "another process"
        except OSError:
            return "another process"
