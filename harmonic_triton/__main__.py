"""Command line: ``python -m harmonic_triton {doctor,verify,loss-kernel}``, also installed as ``harmonic-triton``."""

from __future__ import annotations

import argparse
import sys

from harmonic_triton import __version__
from harmonic_triton.losskernel import cli
from harmonic_triton.tools import doctor, verify


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="harmonic-triton", description="Harmonic loss and loss kernel.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="versions, device, which backend serves and why the others do not")
    verify.add_arguments(
        commands.add_parser("verify", help="every backend against the fp64 reference, on this machine")
    )
    cli.add_arguments(
        commands.add_parser("loss-kernel", help="covariance of a trained model's per-sample losses, with a report")
    )
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        return doctor.main()
    return verify.main(options) if options.command == "verify" else cli.main(options)


if __name__ == "__main__":
    sys.exit(main())
