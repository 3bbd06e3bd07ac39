"""Ceilings: lowered, raised, restored."""

from cdam_server.compute.scheduling import policy
from cdam_server.compute.scheduling.ceilings import Ceilings


def full_batches_until_raised(ceilings: Ceilings) -> int:
    """Computes full batches of bucket "a" until its ceiling changes, and says how many they were."""
    before, count = ceilings.jobs("a"), 0
    while ceilings.jobs("a") == before:
        ceilings.fitted("a", before)
        count += 1
    return count


def test_it_is_half_of_what_did_not_fit_for_that_bucket_alone() -> None:
    ceilings = Ceilings(16)
    ceilings.lower("a", 16)
    assert ceilings.jobs("a") == 8
    ceilings.lower("a", 6)
    assert ceilings.jobs("a") == 3
    ceilings.lower("a", 16)  # of a batch that began before
    assert ceilings.jobs("a") == 3
    assert ceilings.jobs("b") == 16


def test_it_is_raised_by_a_quarter_and_one_at_least_until_it_is_what_it_was() -> None:
    ceilings, seen = Ceilings(16), []
    ceilings.lower("a", 8)
    while ceilings.jobs("a") < 16:
        assert full_batches_until_raised(ceilings) == policy.RAISE_AFTER_BATCHES
        seen.append(ceilings.jobs("a"))
    assert seen == [5, 6, 7, 8, 10, 12, 15, 16]
    assert ceilings.get("a") is None


def test_batches_that_are_not_full_prove_nothing() -> None:
    ceilings = Ceilings(16)
    ceilings.lower("a", 8)
    for _ in range(2 * policy.RAISE_AFTER_BATCHES):
        ceilings.fitted("a", 3)
    assert ceilings.jobs("a") == 4


def test_each_time_it_is_lowered_it_is_raised_later_up_to_a_bound() -> None:
    ceilings, counts = Ceilings(16), []
    for _ in range(9):
        ceilings.lower("a", 16)
        counts.append(full_batches_until_raised(ceilings))
    assert counts == [64, 128, 256, 512, 1024, 2048, 4096, 4096, 4096]


def test_what_was_known_before_can_be_restored() -> None:
    ceilings = Ceilings(16)
    untouched = ceilings.get("a")
    ceilings.lower("a", 16)
    lowered = ceilings.get("a")
    ceilings.lower("a", 4)
    ceilings.restore("a", lowered)
    assert ceilings.jobs("a") == 8
    ceilings.restore("a", untouched)
    assert ceilings.jobs("a") == 16
