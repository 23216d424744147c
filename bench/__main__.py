"""`python -m bench`: what telemetry costs."""

from bench.telemetry import main

main()
