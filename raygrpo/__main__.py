"""`python -m raygrpo` is `raygrpo`."""

from raygrpo.cli import main

main()
