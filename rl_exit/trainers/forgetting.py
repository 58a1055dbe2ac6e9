"""Which instances the last exit had right when training visited them.

:func:`rl_exit.analysis.forgetting` counts forgetting events from it (Toneva et al., 2019): visits at which an instance
is wrong after one at which it was right.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rl_exit.errors import RunError
from rl_exit.files import atomic_file

NOT_VISITED = -1


class Visits:
    """Right or wrong, for each epoch and instance; the answer counts as given in training, with dropout.

    Attributes:
        flags: int8 [E, N]: 1 right, 0 wrong, -1 not visited.
    """

    def __init__(self, epochs: int, count: int) -> None:
        self.flags: npt.NDArray[np.int8] = np.full((epochs, count), NOT_VISITED, dtype=np.int8)

    def record(self, epoch: int, rows: npt.NDArray[np.int64], correct: npt.NDArray[np.int64]) -> None:
        """Note the answers on ``rows`` [B] in ``epoch``, from 0."""
        self.flags[epoch, rows] = correct

    def save(self, path: Path, ids: npt.NDArray[np.int64]) -> None:
        """Write one row per visit, epoch by epoch, instances in their own order.

        Args:
            path: Arrow IPC file with the columns ``id`` (int64), ``epoch`` (int32, from 1) and ``correct`` (bool).
            ids: [N], of the instances.

        Raises:
            UserError: The file cannot be written.
        """
        epoch, row = np.nonzero(self.flags != NOT_VISITED)
        table = pa.record_batch(
            {
                "id": pa.array(ids[row], pa.int64()),
                "epoch": pa.array(epoch + 1, pa.int32()),
                "correct": pa.array(self.flags[epoch, row] == 1, pa.bool_()),
            }
        )
        with (
            atomic_file(path) as beside,
            pa.OSFile(str(beside), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_batch(table)


def read_visits(path: Path) -> pa.Table:
    """Read what :meth:`Visits.save` wrote.

    Raises:
        RunError: Missing or damaged.
    """
    try:
        with pa.memory_map(str(path), "r") as source:
            return pa.ipc.open_file(source).read_all().select(["id", "epoch", "correct"])
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; a run writes it in its initialisation") from None
    except (pa.ArrowException, KeyError, OSError) as error:
        raise RunError(f"{path}: cannot be read as a record of visits: {error}") from None
