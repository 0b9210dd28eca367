"""Unpicklers that return plain data and run nothing.

A pickle names the functions it wants called. Here each name is looked up in a short list: what an index
or a checkpoint's common state consists of becomes an inert `Record` (or a plain dict, tuple, string). Any
other name is refused by name where the pickle calls it; objects of the script that saved, in its arguments,
are inert as well. Where a reader is not `strict`, everything is. Nothing is imported to read one.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from typing import IO, Any


class Record:
    """Stand-in for an object of any class: holds its state, runs nothing.

    Attributes:
        args: what its constructor would have been called with.
        state: the state that is not a dict of attributes; None otherwise.
    """

    state: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state

    def __hash__(self) -> int:
        return id(self)

    def _swallow(self, *args: Any) -> None:
        """What a pickle puts into a container of its own class."""

    __setitem__ = append = extend = add = _swallow


class _Uncallable(type):
    """Of classes whose objects may lie in a pickle, but that it may not call."""

    what = ""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """What REDUCE does, for a function as well; NEWOBJ, of plain objects, goes past it."""
        raise pickle.UnpicklingError(f"{cls.__qualname__} has no place in {cls.what}")


def _foreign(name: str, what: str) -> type:
    return _Uncallable(name, (Record,), {"__qualname__": name, "what": what})


class Size(tuple[int, ...]):
    """Stand-in for torch.Size."""


def _nothing(*args: Any) -> None:
    return None


_TORCH_DTYPE = re.compile(r"(bfloat|float|int|uint|bool|complex)\d*(_e\d+m\d+\w*)?")
_INDEX_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.planner",
    "megatron.core.dist_checkpointing.strategies.torch",
)
_PLAIN = {
    ("torch", "Size"): Size,
    ("torch.serialization", "_get_layout"): _nothing,
    ("collections", "OrderedDict"): dict,
    ("builtins", "dict"): dict,
    ("builtins", "set"): set,
}
_PATHS = {("pathlib", "PosixPath"), ("pathlib", "Path"), ("pathlib._local", "PosixPath")}
# Of Megatron's arguments and optimizer settings: enumerations, numpy scalars, tensors (not read).
_COMMON = {
    ("argparse", "Namespace"),
    ("types", "SimpleNamespace"),
    ("signal", "Signals"),
    ("io", "BytesIO"),
    ("_io", "BytesIO"),
    ("_codecs", "encode"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core")
      for name in ("scalar", "_reconstruct")),
}  # fmt: skip
_STORAGE = re.compile(r"[A-Z][A-Za-z0-9]*Storage")
COMMON_LIMIT = 256 << 20  # bytes of a common state; a real one has tens of kilobytes


class _Unpickler(pickle.Unpickler):
    what = ""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch" and _TORCH_DTYPE.fullmatch(name):
            return name
        if (module, name) in _PATHS or self.knows(module, name):
            return Record
        return self.foreign(f"{module}.{name}")

    def foreign(self, name: str) -> Any:
        """What stands for a name that does not belong to this kind of file."""
        raise pickle.UnpicklingError(f"{name} has no place in {self.what}")

    def knows(self, module: str, name: str) -> bool:
        """Whether the name belongs to this kind of file, as an inert record."""
        return False


class IndexUnpickler(_Unpickler):
    """For `.metadata`, the index of a `torch_dist` checkpoint."""

    what = "a checkpoint index"

    def knows(self, module: str, name: str) -> bool:
        """The classes torch's distributed checkpoints and Megatron's planner write."""
        return module in _INDEX_MODULES and re.fullmatch(r"[A-Za-z_.]+", name) is not None


class _CommonUnpickler(_Unpickler):
    what = "the common state of a checkpoint"

    def __init__(self, file: IO[bytes], strict: bool) -> None:
        super().__init__(file)
        self._strict = strict

    def knows(self, module: str, name: str) -> bool:
        """Megatron's enumerations and settings; tensors are left unread."""
        if not self._strict or (module == "torch" and _STORAGE.fullmatch(name)):
            return True
        return (module, name) in _COMMON or module.startswith("megatron.")

    def foreign(self, name: str) -> Any:
        """A class of the script that saved: slime, for one, keeps objects of its own in the arguments."""
        return _foreign(name, self.what)

    def persistent_load(self, pid: Any) -> Record:
        """A tensor's storage: not read."""
        return Record(pid)


def load_common(file: IO[bytes], strict: bool = True) -> dict[str, Any]:
    """Return the dict in a file that `torch.save` wrote, as plain data and `Record`s.

    Args:
        file: seekable; `common.pt`, or the bytes of `common_state`.
        strict: refuse calls of names that a common state does not consist of. Otherwise they are inert
            like all others.

    Raises:
        pickle.UnpicklingError: such a name.
        zipfile.BadZipFile: damaged, or written in torch's format before 1.6.
        ValueError: no pickle in it, one too long, or one of something else.
    """
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError("not a file of torch.save: no data.pkl in it")
        if archive.getinfo(names[0]).file_size > COMMON_LIMIT:
            raise ValueError(f"a pickle of {archive.getinfo(names[0]).file_size} bytes")
        with archive.open(names[0]) as pickled:
            found = _CommonUnpickler(pickled, strict).load()
    if isinstance(found, list) and len(found) == 1:
        found = found[0]  # how Megatron stores an object: a list of its local parts
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__} instead of a dict")
    return found
