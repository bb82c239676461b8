"""`python -m ssmpretrain`: an import and a call."""

from ssmpretrain.cli import run_process as main

if __name__ == "__main__":
    raise SystemExit(main())
