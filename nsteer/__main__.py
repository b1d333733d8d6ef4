"""`python -m nsteer` is the command `nsteer`."""

from nsteer.cli import main

if __name__ == "__main__":
    main(prog_name="nsteer")
