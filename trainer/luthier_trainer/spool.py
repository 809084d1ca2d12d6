"""The spool: an attempt's reports on disk, the truth between trainer and server."""

import contextlib
import errno
import os
import socket
import threading
import time
from pathlib import Path

from luthier.trainer import attempt
from luthier_trainer.errors import TrainingError
from luthier_trainer.report import Payload, trainer_report

_SYNC_INTERVAL = 0.2
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class SpoolReporter:
    """Appends each report to the attempt's spool in one write, then pokes the server's wake socket.

    Sequences are dense from 1. The caller holds the attempt's lock. Raises FileExistsError when the spool holds
    anything already: an attempt has one life. `report` raises TrainingError STORAGE_FULL when the disk takes no more;
    a record that did not fit leaves no trace, so that a shorter last one may follow.
    """

    def __init__(self, attempt_dir: Path, wake_socket: str) -> None:
        path = attempt_dir / attempt.SPOOL
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        if os.fstat(self._fd).st_size:
            os.close(self._fd)
            raise FileExistsError(errno.EEXIST, "the attempt has reported already", str(path))
        self._job_id = attempt_dir.parent.name
        self._wake_socket = wake_socket
        self._wake = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._wake.setblocking(False)
        self._lock = threading.Lock()
        self._sequence = 0
        self._size = 0
        self._synced_at = 0.0

    def report(self, payload: Payload, *, durable: bool = False) -> None:
        with self._lock:
            record = attempt.frame(trainer_report(payload, self._sequence + 1).SerializeToString())
            try:
                self._append(record)
                self._sequence += 1
                self._sync(durable)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                raise TrainingError(
                    "STORAGE_FULL",
                    f"the disk takes no more reports: {error.strerror}",
                    "free some space; the job goes on from its newest checkpoint",
                    retryable=True,
                ) from error
        poke(self._wake, self._wake_socket, self._job_id)

    def close(self) -> None:
        """Ends the reporting; nothing is reported after."""
        os.close(self._fd)
        self._wake.close()

    def _append(self, record: bytes) -> None:
        try:
            if os.write(self._fd, record) < len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(record)

    def _sync(self, durable: bool) -> None:
        if durable or time.monotonic() - self._synced_at >= _SYNC_INTERVAL:
            os.fdatasync(self._fd)
            self._synced_at = time.monotonic()


def poke(wake: socket.socket, path: str, job_id: str) -> None:
    """Tells the server's socket which job has news. It may be full or gone: a hint only, the server sweeps anyway."""
    with contextlib.suppress(OSError):
        wake.sendto(job_id.encode(), path)
