"""`folojax generate`, from a checkout: `python scripts/generate.py --help` has examples."""

import sys

from folojax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
