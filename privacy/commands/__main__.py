"""``python -m privacy.commands``: what ``dp-lora`` runs."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
