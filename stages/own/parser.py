"""Command lines with options."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """One line for what it cannot read, without the list of all options before it."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        name = self.prog.removeprefix("python -m ").removeprefix("stages.")
        self.exit(2, f"error: {name}: {message}; usage: {self.prog} --help\n")
