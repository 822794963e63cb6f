"""`python -m ds_engine` is the command `ds`, for an interpreter whose script directory is not on PATH."""

from ds_engine.cli.main import main

if __name__ == "__main__":
    main()
