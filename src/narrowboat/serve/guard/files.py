"""Reading files that hold secrets: only if nobody else can."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from narrowboat.errors import ServeError

LARGEST = 2**16  # bytes; neither tokens nor certificates come near


def read_file(file: Path, what: str, error: type[ServeError], *, private: bool) -> bytes:
    """The bytes of a regular file.

    Args:
        file: to read.
        what: it is, for messages.
        error: that is raised if it cannot be used.
        private: it has to belong to us or root, and nobody else may be able to read or write it.
    """
    try:
        # Not to wait for a writer, should it be a pipe.
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as wrong:
        raise error(f"{file}: the {what} cannot be read: {wrong.strerror}") from wrong
    try:
        # Asked of what is open, not of the name, which could mean another file by then.
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{file}: the {what} is no file")
        if private:
            if status.st_uid not in (os.geteuid(), 0):
                raise error(f"{file}: belongs to another user, who could change it: it has to be yours or root's")
            if status.st_mode & 0o077:
                mode = stat.S_IMODE(status.st_mode)
                raise error(
                    f"{file}: others can read or write it (mode {mode:o}): `chmod 600 {file}`, and make a new {what} "
                    "if it was so for long"
                )
        if status.st_size > LARGEST:
            raise error(f"{file}: {status.st_size} bytes is no {what}")
        return os.read(descriptor, LARGEST)
    except OSError as wrong:
        raise error(f"{file}: the {what} cannot be read: {wrong.strerror}") from wrong
    finally:
        os.close(descriptor)
