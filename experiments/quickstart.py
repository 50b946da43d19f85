"""The tour of collaboration on two real models (also `collab-jax demo`).

Claim: models are joined in parameters, in distributions and by prompts with the same
few pieces, each in one compiled program, and each join passes an exact check.
Command: python experiments/quickstart.py [--smoke] [--output results.json]
Hardware: two CPU cores, 4 GiB; under three minutes after the downloads (`--smoke`:
seconds, random toy models, no downloads).
Expected: 8 of 8 checks hold; a table, and with --output the same as JSON.
"""

import argparse
import sys

from collab_jax import demo


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and runs the tour; 0 when every check held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="toy models, seconds")
    parser.add_argument("--new-tokens", type=int, default=40, metavar="N")
    parser.add_argument("--steps", type=int, default=8, help="of the LoRA variant")
    parser.add_argument("--output", metavar="FILE", help="write the table as JSON")
    parser.add_argument("--json", action="store_true", help="print JSON, no table")
    chosen = parser.parse_args(arguments)
    held = demo.main(
        chosen.smoke, chosen.new_tokens, chosen.steps, chosen.output, chosen.json
    )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
