"""``python -m recursify`` is the ``recursify`` command."""

from recursify.cli.app import main

if __name__ == "__main__":
    main()
