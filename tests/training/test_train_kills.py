"""Training processes that are killed at any moment: nothing is lost, nothing is done twice."""

import pytest
from helpers import kill_driver

KILLS = 12


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path):
    """`python benchmarks/kills.py --kills=500` is the longer run of this."""
    driver = kill_driver.Driver(tmp_path)
    expected = driver.undisturbed()
    assert [r["step"] for r in expected.records] == list(range(1, kill_driver.STEPS + 1))
    assert sorted(expected.batches) == list(range(kill_driver.STEPS))
    assert len(set.union(*expected.batches.values())) == kill_driver.STEPS  # all batches differ
    runs = 0
    while driver.count.all < KILLS:
        runs += 1
        found = driver.killed(f"run{runs}", KILLS - driver.count.all)
        assert found.batches == expected.batches
        assert found.records == expected.records
        assert found.tensors == expected.tensors
    print(driver.count, runs)
    assert driver.count.starting >= 3
    assert driver.count.writing >= 3
