"""`python -m service` is the command `ravine`."""

from service.cli import main

main()
