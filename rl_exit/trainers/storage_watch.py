"""Storage that goes away for a while: noticed beside the work, waited for, and the open step done again.

A network file system that is mounted hard blocks, and nothing needs to be done. One that is mounted soft fails with an
error. One whose mount is gone leaves an empty folder of the local disk in its place, which takes what is written and
loses it: therefore a file of the run is looked at every second, and a step during which it was ever missing is not
believed.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType

from rl_exit.errors import RunError

LOOK_SECONDS = 1.0
AWAY_SECONDS = 600.0  # how long to wait for storage that is away


class StorageWatch:
    """Looks at one file for as long as the block runs; does nothing if it cannot be read at the start.

    Args:
        file: A file that is there as long as the storage is, and does not change.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._content = self._read()
        self._over = threading.Event()
        self._was_away = False
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> StorageWatch:
        if self._content is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()

    @property
    def was_away(self) -> bool:
        """Whether the file has been missing at any look, or is now."""
        self._was_away = self._was_away or not self.present
        return self._was_away

    @property
    def present(self) -> bool:
        """Whether the file can be read and is the same."""
        return self._content is None or self._read() == self._content

    def await_back(self) -> float:
        """Wait until the file is there; returns the seconds.

        Raises:
            RunError: It is not after ``AWAY_SECONDS``.
        """
        begun = time.monotonic()
        while not self.present:
            if time.monotonic() - begun > AWAY_SECONDS:
                raise RunError(
                    f"{self._file.parent}: this storage has been away for {AWAY_SECONDS:.0f} s; when it is back, "
                    "--resume goes on"
                )
            time.sleep(LOOK_SECONDS)
        return time.monotonic() - begun

    def _look(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            if not self.present:
                self._was_away = True

    def _read(self) -> bytes | None:
        try:
            return self._file.read_bytes()
        except OSError:
            return None
