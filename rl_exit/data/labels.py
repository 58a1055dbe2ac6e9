"""Labels: from integers or strings in a column to class numbers and class names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rl_exit.data.sources import RawSplit
from rl_exit.errors import DataError, nearest

# Up to 18 digits fit int64; longer ones stay the names they are.
_INTEGER_TEXT = r"^\s*[+-]?\d{1,18}(\.0*)?\s*$"
_NAME_SUFFIXES = ("_name", "_text", "_names")


@dataclass(frozen=True)
class Labels:
    """A label column.

    Attributes:
        where: Name of the split for messages.
        column: Name of the column.
        values: [N] int64 or string array; nulls are missing labels.
    """

    where: str
    column: str
    values: pa.Array

    @property
    def are_text(self) -> bool:
        """Whether the labels are strings."""
        return pa.types.is_string(self.values.type)

    @property
    def missing(self) -> npt.NDArray[np.bool_]:
        """[N], where there is no label."""
        return np.asarray(self.values.is_null().to_numpy(zero_copy_only=False), dtype=np.bool_)

    @property
    def all_unlabelled(self) -> bool:
        """Whether the split withholds its labels: all missing or all -1, as in GLUE."""
        if self.missing.all():
            return True
        return not self.are_text and bool(pc.all(pc.equal(self.values, -1), skip_nulls=True).as_py())


@dataclass(frozen=True)
class Classes:
    """The classes of a task.

    Attributes:
        names: [C], in the order of their numbers.
        numbers: Label as found in the column -> class number; None: the label is the number already.
        declared: Whether someone named the classes beforehand, rather than that they were found in train.
    """

    names: tuple[str, ...]
    numbers: Mapping[int | str, int] | None
    declared: bool


def read_labels(split: RawSplit, column: str) -> Labels:
    """The label column of a split.

    Raises:
        DataError: The column holds something other than integers or strings.
    """
    array = _one_chunk(split.table.column(column))
    where = f"{split.where}, column '{column}'"
    kind = array.type
    if pa.types.is_dictionary(kind):
        array, kind = array.cast(kind.value_type), kind.value_type
    if pa.types.is_boolean(kind):
        array = array.cast(pa.int8())
    elif pa.types.is_floating(kind):
        array = _whole(array, where)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        array = array.cast(pa.string())
        if not split.typed and pc.all(pc.match_substring_regex(array, _INTEGER_TEXT)).as_py():
            digits = pc.replace_substring_regex(pc.utf8_trim_whitespace(array), r"^\+|\.0*$", "")
            array = digits.cast(pa.int64())
    elif not (pa.types.is_integer(kind) or pa.types.is_null(kind)):
        mixed = " (mixed types)" if "json" in str(kind) else ""
        raise DataError(f"{where}: a label is an integer or a string, the column holds {kind}{mixed}")
    if not pa.types.is_string(array.type):
        try:
            array = array.cast(pa.int64())
        except pa.ArrowInvalid as error:  # infinite, or beyond 64 bits
            raise DataError(f"{where}: a label is an integer of at most 64 bits or a string: {error}") from None
    return Labels(split.where, column, array)


def find_classes(
    labels: Labels, split: RawSplit, given: Sequence[str] | None, registered: Sequence[str] | None
) -> Classes:
    """Decide on the classes: ``task.labels``, else names that the column declares, else a column of names beside it
    (``label_name``, ``label_text``), else the registered task's, else what occurs in train, sorted.

    Args:
        labels: The labels of train.
        split: The split they come from.
        given: ``task.labels``.
        registered: Names known of a registered task.

    Raises:
        DataError: Fewer than two classes, a name twice, or so many classes that the column cannot be one of classes.
    """
    if given is not None:
        return _declared(labels, tuple(given), "task.labels")
    if labels.column in split.class_names:
        return _declared(labels, split.class_names[labels.column], f"{labels.where}, column '{labels.column}'")
    values = pc.unique(labels.values.drop_null()).to_pylist()
    beside = None if labels.are_text else _names_beside(labels, split)
    if beside is not None:
        numbers = sorted(beside)
        return Classes(tuple(beside[number] for number in numbers), {n: i for i, n in enumerate(numbers)}, False)
    if registered is not None:
        return _declared(labels, tuple(registered), "the registered task")
    _check_missing(labels, labels.missing)
    values.sort()
    if len(values) > max(len(labels.values) // 2, 20):
        raise DataError(
            f"{labels.where}, column '{labels.column}': {len(values)} different labels in {len(labels.values)} rows; "
            "that is no column of classes, task.label names another"
        )
    if len(values) < 2:
        shown = f"only {values[0]!r}" if values else "none"
        raise DataError(f"{labels.where}, column '{labels.column}': at least 2 classes are needed, there is {shown}")
    return Classes(tuple(str(value) for value in values), {value: i for i, value in enumerate(values)}, False)


def encode(labels: Labels, classes: Classes) -> npt.NDArray[np.int64]:
    """Class number of every row, [N].

    Raises:
        DataError: A label is missing or belongs to no class; the message names the row and the value.
    """
    missing = labels.missing
    if classes.numbers is None:
        values = labels.values.fill_null(-1).to_numpy()
        missing |= values == -1
        numbers = np.where((values >= 0) & (values < len(classes.names)), values, -1)
    else:
        accepted = list(classes.numbers)
        kind = pa.string() if isinstance(accepted[0], str) else pa.int64()
        if (kind == pa.string()) != labels.are_text:
            found, expected = ("text", "integers") if labels.are_text else ("integers", "text")
            raise DataError(
                f"{labels.where}, column '{labels.column}': labels are {found} here, but {expected} in train"
            )
        index = pc.index_in(labels.values, value_set=pa.array(accepted, type=kind))
        codes = np.asarray([classes.numbers[value] for value in accepted], dtype=np.int64)
        position = index.fill_null(-1).to_numpy().astype(np.int64)
        numbers = np.where(position >= 0, codes[position], -1)
    _check_missing(labels, missing)
    if (numbers < 0).any():
        raise _outside(labels, classes, _first(numbers < 0))
    return numbers.astype(np.int64, copy=False)


def _first(mask: npt.NDArray[np.bool_]) -> int:
    return int(np.argmax(mask))


def _check_missing(labels: Labels, missing: npt.NDArray[np.bool_]) -> None:
    if missing.any():
        raise DataError(
            f"{labels.where}, column '{labels.column}': the label is missing in row {_first(missing)} (counted from 0)"
            f", {int(missing.sum())} of {len(missing)} in all; remove these rows"
        )


def _outside(labels: Labels, classes: Classes, row: int) -> DataError:
    value = labels.values[row].as_py()
    names = ", ".join(classes.names[:30]) + (", …" if len(classes.names) > 30 else "")
    hint = nearest(value, classes.names) if isinstance(value, str) else ""
    if not classes.declared:
        return DataError(
            f"{labels.where}, column '{labels.column}': label {value!r} in row {row} (counted from 0) does not occur "
            f"in train.{hint} Classes there: {names}; task.labels can name more"
        )
    accepted = f"the classes are {names}"
    if classes.numbers is None:
        accepted = f"accepted: 0..{len(classes.names) - 1} ({names})"
    return DataError(
        f"{labels.where}, column '{labels.column}': label {value!r} in row {row} (counted from 0) is outside the "
        f"classes.{hint} Here {accepted}; task.labels names others"
    )


def _declared(labels: Labels, names: tuple[str, ...], by: str) -> Classes:
    if len(set(names)) < len(names):
        raise DataError(f"{by}: class '{next(n for n in names if names.count(n) > 1)}' is named twice")
    if len(names) < 2:
        raise DataError(f"{by}: at least 2 classes are needed, {len(names)} is named")
    if labels.are_text:
        return Classes(names, {name: number for number, name in enumerate(names)}, True)
    # Classes that are themselves called 1, 2, ... are matched by name, as they would be if quoted.
    if all(name.lstrip("-").isdigit() for name in names):
        return Classes(names, {int(name): number for number, name in enumerate(names)}, True)
    return Classes(names, None, True)


def _names_beside(labels: Labels, split: RawSplit) -> dict[int, str] | None:
    """Number -> name from a column such as ``label_name``, where the two go together one to one."""
    for suffix in _NAME_SUFFIXES:
        column = labels.column + suffix
        if column not in split.table.column_names:
            continue
        names = _one_chunk(split.table.column(column))
        if not (pa.types.is_string(names.type) or pa.types.is_large_string(names.type)):
            continue
        pairs = pa.table({"number": labels.values, "name": names.cast(pa.string())}).group_by(["number", "name"])
        found = pairs.aggregate([]).drop_null()
        mapping = dict(zip(found["number"].to_pylist(), found["name"].to_pylist(), strict=True))
        if 1 < len(mapping) == len(found) == len(set(mapping.values())):
            return mapping
    return None


def _whole(array: pa.Array, where: str) -> pa.Array:
    """Floats as integers, NaN as missing: pandas writes integers with a gap as floats."""
    array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
    fractional = np.asarray(
        pc.not_equal(array, pc.floor(array)).fill_null(False).to_numpy(zero_copy_only=False), dtype=np.bool_
    )
    if fractional.any():
        row = _first(fractional)
        raise DataError(
            f"{where}: label {array[row].as_py()!r} in row {row} (counted from 0) is no class; "
            "integers or strings are accepted"
        )
    return array


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)
