"""`python -m segpipe`: the command line."""

from segpipe.cli import main

main()
