"""Runs the command line as `python -m streaming_polyak`."""

from streaming_polyak.cli import main

main(prog_name="streaming-polyak")
