"""SciCode's official targets, test_data.h5, in the layout of the official repository (scicode-bench/SciCode).

Each test has a group STEP/testN with var1, var2, …: a single one is the test's target; several form a tuple.
A value is one of:

- a dataset: a number, an array or a text
- a group that holds a group `list`: a list with the items var1, var2, …
- a group that holds a group `sparse_matrix`: `data` and `shape`, with `row` and `col` (COO) or `indices` and
  `indptr` (CSR), and with `blocksize` also (BSR)
- any other group: a dict; names that are numbers become numbers

The file has about 1 GB. A step's targets are read when they are needed, and nothing is kept.
"""

import base64
import hashlib
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from emlocal.errors import EmlocalError, UsageError

_HINT = "add the official test_data.h5 with --targets"


class TargetFile:
    """The official targets. The file is open only while it is read."""

    def __init__(self, path: Path) -> None:
        """Reads the whole file once for its hash, in a second or two.

        Raises UsageError for a file that is missing, cannot be read or is not HDF5. Raises EmlocalError
        without h5py.
        """
        if find_spec("h5py") is None:
            raise EmlocalError("--targets reads HDF5, which needs the package h5py", "pip install h5py")
        self._path = path.expanduser()
        try:
            with self._path.open("rb") as file:
                self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise UsageError(f"there is no file {path}", _HINT) from None
        except OSError as why:
            raise UsageError(f"cannot read {path}: {why.strerror or why}", _HINT) from why
        with self._opened():
            pass
        self.source = f"{path.name}, sha256 {self.sha256}"
        """Name and SHA-256 of the file."""

    def check(self, steps: Mapping[str, int]) -> None:
        """Raises UsageError if targets are missing. `steps`: the number of tests of each step."""
        import h5py

        with self._opened() as file:
            for step, tests in steps.items():
                for name in (_group(step, test) for test in range(1, tests + 1)):
                    if not isinstance(file.get(name), h5py.Group):
                        raise UsageError(f"{self._path} lacks the targets {name} of SciCode", _HINT)

    def packed(self, step: str, tests: int) -> str:
        """Returns the list of targets of a step's tests, pickled, in base64.

        Raises UsageError for targets that cannot be read.
        """
        with self._opened() as file:
            try:
                targets = [_target(file[_group(step, test)]) for test in range(1, tests + 1)]
            except (OSError, KeyError, ValueError) as why:
                raise UsageError(f"{self._path}: the targets of step {step} cannot be read: {why}") from why
        return base64.b64encode(pickle.dumps(targets)).decode()

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        import h5py

        try:
            file = h5py.File(self._path, "r")
        except OSError as why:  # some of h5py's messages have several lines
            said = " ".join(str(why).split())
            raise UsageError(f"{self._path} cannot be read as HDF5: {said}", _HINT) from why
        with file:
            yield file


def _group(step: str, test: int) -> str:
    return f"{step}/test{test}"


def _target(group: Any) -> Any:
    values = [_value(group[name]) for name in _in_order(group)]
    return values[0] if len(values) == 1 else tuple(values)


def _value(node: Any) -> Any:
    import h5py

    if isinstance(node, h5py.Dataset):
        value = node[()]
        return value.decode() if isinstance(value, bytes) else value
    members = dict(node)
    if isinstance(items := members.get("list"), h5py.Group) and len(members) == 1:
        return [_value(items[name]) for name in _in_order(items)]
    if "sparse_matrix" in members:
        return _sparse(members["sparse_matrix"])
    return {
        _key(name, value): value for name, value in ((n, _value(member)) for n, member in members.items())
    }


def _in_order(group: Any) -> list[str]:
    """Sorts var1, var2, … var10 by number.

    HDF5 sorts them by name, and the official code keeps that order.
    """

    def place(name: str) -> tuple[int, str]:
        number = name.removeprefix("var")
        return (int(number) if number.isdecimal() else 0, name)

    return sorted(group, key=place)


def _key(name: str, value: Any) -> str | float:
    """Returns a dict's key. Names of texts, dicts and sparse matrices stay text, as in the official code."""
    if isinstance(value, str | list | dict) or "sparse" in type(value).__module__:
        return name
    try:
        return float(name)
    except ValueError:
        return name


def _sparse(group: Any) -> Any:
    from scipy import sparse

    part = {name: member[()] for name, member in group.items()}
    data, shape = part["data"], tuple(map(int, part["shape"]))
    if "row" in part:
        return sparse.coo_matrix((data, (part["row"], part["col"])), shape=shape)
    compressed = (data, part["indices"], part["indptr"])
    if "blocksize" in part:
        return sparse.bsr_matrix(compressed, shape=shape, blocksize=tuple(map(int, part["blocksize"])))
    # CSC is stored like CSR. The official code reads both as CSR, which works only for square matrices.
    made = sparse.csr_matrix if len(part["indptr"]) == shape[0] + 1 else sparse.csc_matrix
    return made(compressed, shape=shape)
