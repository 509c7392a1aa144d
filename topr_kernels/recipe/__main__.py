"""``python -m topr_kernels.recipe``: the console script ``topr``, for launchers that start modules."""

import sys

from topr_kernels.recipe.cli import main

if __name__ == "__main__":
    sys.exit(main())
