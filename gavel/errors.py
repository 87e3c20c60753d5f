"""What the command line says instead of a traceback."""


class CommandError(Exception):
    """One sentence for the person at the terminal: what is wrong, and the way out. The command ends with code 1."""
