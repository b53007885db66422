"""The entry point: sets the OpenMP policy, runs the command, turns errors into one line and an exit code.

Exit codes: 0 success, 1 the work failed or was refused, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from narrowboat.errors import NarrowboatError, UsageError
from narrowboat.machine.openmp import apply_openmp_policy

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line ``argv`` (the process's own by default) and exit."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The OpenMP runtime reads its environment when torch is loaded: nothing above may have imported torch.
    apply_openmp_policy()
    from narrowboat.cli.app import build_command
    from narrowboat.cli.complete import ASKED

    code: int | str | None
    try:
        if arguments[:1] == [ASKED]:  # a shell asks what could be typed next
            _complete(arguments[1:])
        else:
            build_command().main(args=arguments, prog_name="narrowboat")
        code = 0
    except NarrowboatError as error:
        _report(error, as_json="--json" in arguments)
        code = EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED
    except BrokenPipeError:  # a reader that left (``| head``)
        code = 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.stderr.write("error: the output could not be written: no space left on the device\n")
        code = EXIT_FAILED
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except SystemExit as finished:
        code = finished.code
    _flush_quietly()
    sys.exit(code)


def _complete(arguments: list[str]) -> None:
    from narrowboat.cli.app import build_command
    from narrowboat.cli.complete import answer

    for line in answer(arguments, build_command()):
        sys.stdout.write(f"{line}\n")


def _report(error: NarrowboatError, *, as_json: bool) -> None:
    from narrowboat.cli.output import print_error, print_json

    if as_json:
        print_json({"error": {"type": type(error).__name__, "message": str(error), **vars(error)}})
    print_error(str(error))


def _flush_quietly() -> None:
    """Flush the output; a reader that left (``| head``) is not worth a traceback at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
