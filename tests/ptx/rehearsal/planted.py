"""A test that fails, for the rehearsal of gpu_suite.sh."""


def test_golden_planted() -> None:
    raise AssertionError("planted")
