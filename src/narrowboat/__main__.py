"""``python -m narrowboat`` is the ``narrowboat`` command."""

from narrowboat.cli.main import main

if __name__ == "__main__":
    main()
