"""`python -m app` is `trellis`."""

from app.cli.main import main

main()
