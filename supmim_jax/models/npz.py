"""Reading .npz files that may be of any origin: without pickle, and no larger than they look."""

import os
import zipfile

import numpy as np
from etils import epath

MOST_RATIO = 100  # arrays to file, in bytes; weights do not compress so well, bombs do


def read(path: epath.Path) -> dict[str, np.ndarray]:
    """The arrays of a file.

    Raises:
      ValueError: it cannot be read, or is no .npz of plain arrays; the message says why.
    """
    try:
        with path.open("rb") as file:
            claimed = sum(member.file_size for member in zipfile.ZipFile(file).infolist())
            if claimed > MOST_RATIO * file.seek(0, os.SEEK_END) + 2**20:
                raise ValueError(f"it would unpack to {claimed} bytes")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # numpy and zipfile raise all kinds for a damaged file
        raise ValueError(str(error) or type(error).__name__) from None
