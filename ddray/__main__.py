"""`python -m ddray` is `ddray`."""

from ddray.cli import main

main()
