"""`python -m peft_heads …` and `accelerate launch -m peft_heads …`."""

import sys

from .cli.main import main


if __name__ == "__main__":
    sys.exit(main())
