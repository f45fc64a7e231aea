"""`python -m shoestring`, the same as the command."""

import sys

from .cli import main

if __name__ == "__main__":  # processes of a comparison read this file too
    sys.exit(main())
