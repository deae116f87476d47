"""The command line."""

import signal


def main() -> None:
    """Entry point of the console script; Ctrl-C while modules are loaded ends it without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from netlab.cli.main import main as run

    run()
