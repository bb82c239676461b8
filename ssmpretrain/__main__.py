"""`python -m ssmpretrain`: an import and a call."""

from ssmpretrain.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
