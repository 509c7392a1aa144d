"""The paper's comparisons at the size of a small machine: ``python -m benchmarks.learning --help``."""
