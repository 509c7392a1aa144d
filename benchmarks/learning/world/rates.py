"""Learning rates that the pilot chose: written by hand from what it printed, before the run."""

#: By (method, level of the ratio, columns, per cent right of the base).
RATES: dict[tuple[str, str, int, int], float] = {}
