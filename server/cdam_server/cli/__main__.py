"""`python -m cdam_server.cli`, the same as `cdam`."""

from cdam_server.cli import main

main(prog_name="cdam")
