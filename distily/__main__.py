"""``python -m distily`` is the ``distily`` command."""

from distily.cli import main

if __name__ == "__main__":
    main()
