"""Arrays in .npy files. Rows of files in an object store are read when they are needed, not the whole file."""

import json
import math
import os
import shlex
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from retrieval.errors import UserError
from retrieval.storage.data_files import split_path
from retrieval.storage.root import Root

FLOATS = (np.float16, np.float32, np.float64)
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""Readers of the header, by version of the format."""
BFLOAT16 = np.dtype("V2")
"""The type of bfloat16 in .npy files, which have no name for it."""


class NpyRows:
    """The rows of a .npy file, (n, dim) of FLOATS in any byte order. Raises UserError for other files."""

    def __init__(self, root: Root, name: str) -> None:
        self._root, self._name = root, name
        self._array = check_array(load_npy(root, name), root.at(name)) if root.is_local else None
        if self._array is None:
            self._read_header()

    def _read_header(self) -> None:
        with self._root.open(self._name) as file:
            try:
                read_header = HEADERS[np.lib.format.read_magic(file)]
                self._shape, self._is_by_column, self._dtype = read_header(file)
                self._offset = file.tell()
                if self._dtype.hasobject:
                    raise ValueError("it has Python objects")
            except (ValueError, KeyError) as error:
                raise UserError(f"{self._root.at(self._name)} is not a readable .npy file: {error}") from error
        _check_vectors(self._shape, self._dtype, self._root.at(self._name))
        size = self._root.size(self._name)
        if min(self._shape) < 0 or size < self._offset + math.prod(self._shape) * self._dtype.itemsize:
            raise UserError(
                f"{self._root.at(self._name)} has {size:,} bytes, too few for its array {self._shape}. Copy it again."
            )

    def __len__(self) -> int:
        return len(self._array) if self._array is not None else int(self._shape[0])

    def read(self, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Rows from `start` to `stop`, fewer if the file ends before. Raises UserError if it is truncated.

        The first call reads the whole array if its rows are not stored one after another.
        """
        if self._array is None and self._is_by_column:
            self._array = load_npy(self._root, self._name)
        if self._array is not None:
            return self._array[start:stop]
        count, dim = min(stop, len(self)) - start, self._shape[1]
        row_bytes = dim * self._dtype.itemsize
        with self._root.open(self._name) as file:
            file.seek(self._offset + start * row_bytes)
            data = file.read(count * row_bytes)
        if len(data) != count * row_bytes:
            raise UserError(f"{self._root.at(self._name)} ends before row {start + count}. Copy it again.")
        return np.frombuffer(data, self._dtype).reshape(count, dim)


def load_npy(root: Root, name: str) -> npt.NDArray[np.generic]:
    """The array in a .npy file, memory-mapped if the file is local. Raises UserError for other files."""
    with root.local(name) as path:
        try:
            array = np.load(path, mmap_mode="r" if root.is_local else None, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{root.at(name)} is not a readable .npy file: {error}") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{root.at(name)} is an archive of arrays; expected one array in a .npy file")
    return array


def load_own_npy(path: str | os.PathLike[str]) -> npt.NDArray[np.generic]:
    """As `load_npy`, for a file that a user names."""
    root, name = split_path(path)
    if not root.is_file(name):
        raise UserError(f"{root.at(name)} is no file. Name a .npy file of vectors.")
    return load_npy(root, name)


def check_array(array: npt.NDArray[np.generic], location: str) -> npt.NDArray[np.generic]:
    """The array. Raises UserError unless it is (n, dim) of FLOATS in any byte order."""
    _check_vectors(array.shape, array.dtype, location)
    return array


def _check_vectors(shape: tuple[int, ...], dtype: np.dtype[np.generic], location: str) -> None:
    if len(shape) != 2 or dtype.newbyteorder("=") not in FLOATS:
        raise UserError(
            f"{location} is an array {shape} of {dtype}; expected (rows, dim) of float16, float32 or float64."
            f"{_conversion(dtype, location) if len(shape) == 2 else ''}"
        )


def _conversion(dtype: np.dtype[np.generic], location: str) -> str:
    """How to convert an array of other numbers to float32; "" for other values."""
    if dtype == BFLOAT16:
        note, floats = " bfloat16 is stored as this type.", '(a.view("uint16").astype("uint32") << 16).view("float32")'
    elif dtype.kind in "iuf":
        note, floats = "", 'a.astype("float32")'
    else:
        return ""
    if not location.lower().endswith(".npy"):
        return f"{note} Convert an array a of it: {floats}."
    path = PurePosixPath(location).name if "://" in location else location
    new = str(PurePosixPath(path).with_suffix(".floats.npy"))
    old, new = (json.dumps(name, ensure_ascii=False) for name in (path, new))
    program = f"import numpy; a = numpy.load({old}); numpy.save({new}, {floats})"
    return f"{note} Run: python3 -c {shlex.quote(program)} and then remove the old file."
