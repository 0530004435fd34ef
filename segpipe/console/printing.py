"""How results are printed, whatever they are."""

import sys

from rich.console import Console
from rich.table import Table

# Width of tables where nothing is known of the reader's screen: rows stay whole in files and pipes.
_PIPE_WIDTH = 200


def print_out(content: str | Table) -> None:
    """Print a result to stdout: as wide as the terminal, and with whole rows elsewhere."""
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    Console(file=sys.stdout, highlight=False, soft_wrap=True, width=width).print(content)
