"""ArrayRecord files read at random, few of them open at a time.

A process may have 1,024 files open, often, and a data set may have more shards. And a read that the
system refuses (no more open files, a disk or a server that fails) says nothing of the record: it
ends the run, which a record that is broken does not.
"""

import contextlib
import errno
import os
import re
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence

from array_record.python import array_record_module

from supmim_jax.config import SetupError

ENOUGH = 2**16  # files; more makes nothing faster
FAILED = re.compile(r"\w+\(\) failed: ([^;]+)")  # what ArrayRecord says of a system call
NUMBERS = {os.strerror(number): number for number in errno.errorcode}
OPTIONS = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 2**15}


def allow_many_files() -> None:
    """Raises this process's limit to open files to what the system lets it have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):  # macOS has a limit that it does not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def most_open() -> int:
    """How many files one reader may hold; a process has a few readers, and files of its own."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return ENOUGH if soft == resource.RLIM_INFINITY else max(soft // 8, 1)


def check_system(error: Exception, path: str) -> None:
    """Returns if ArrayRecord found fault with what a file holds.

    Raises:
      SetupError: this process has too many files open.
      OSError: another call to the system failed.
    """
    said = FAILED.search(str(error))
    if not said:
        return
    number = NUMBERS.get(said[1].strip(), errno.EIO)
    if number == errno.EMFILE:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise SetupError(
            f"{path} cannot be opened: this process has as many files open as it may, {soft}. "
            f"Raise that limit (`ulimit -n 65536`; it may be set to {hard} here, and by an "
            f"administrator to more), then run the same command again."
        )
    raise OSError(number, said[1].strip(), path)


def count(path: str) -> int:
    """The records of a file, of which only the end is read.

    Raises:
      ValueError: it is cut, or of another form.
      SetupError, OSError: as `check_system`.
    """
    reader = array_record_module.ArrayRecordReader(path, **OPTIONS)
    try:
        found = reader.num_records()
        reader.close()  # which tells what has gone wrong before
    except (RuntimeError, ValueError) as error:
        check_system(error, path)
        raise ValueError(f"is cut or no ArrayRecord file ({str(error)[:200]})") from None
    return found


class Readers:
    """Reads records of many files, of which it holds most_open(); travels to worker processes."""

    def __init__(self, paths: Sequence[str]):
        self.paths = paths
        self.open: OrderedDict[int, array_record_module.ArrayRecordReader] = OrderedDict()
        self.lock = threading.Lock()

    def __getstate__(self) -> Sequence[str]:
        return self.paths

    def __setstate__(self, paths: Sequence[str]) -> None:
        self.__init__(paths)

    def read(self, index: int, position: int) -> bytes:
        """The record at a position of the file with this index.

        Raises:
          RuntimeError, ValueError, IndexError: what ArrayRecord finds wrong with the file.
          SetupError, OSError: as `check_system`.
        """
        try:
            return self._reader(index).read([position])[0]
        except (RuntimeError, ValueError) as error:
            with self.lock:
                self.open.pop(index, None)  # it would repeat its fault for ever
            check_system(error, self.paths[index])
            raise

    def _reader(self, index: int) -> array_record_module.ArrayRecordReader:
        with self.lock:
            if index not in self.open:
                while len(self.open) >= most_open():
                    self.open.popitem(last=False)  # closed when no thread reads from it any more
                path = self.paths[index]
                self.open[index] = array_record_module.ArrayRecordReader(path, **OPTIONS)
            self.open.move_to_end(index)
            return self.open[index]
