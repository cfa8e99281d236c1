"""``python -m moespac`` is the ``moespac`` command."""

from moespac.cli import main

if __name__ == "__main__":
    main()
