"""`python -m cdam_cli`, the same as `cdam`."""

from cdam_cli import main

main(prog_name="cdam")
