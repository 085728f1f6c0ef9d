"""Calls are taken in turn, and the first of each does not count."""

import time

from chassis_utils.timing import median_seconds


def test_calls_are_taken_in_turn_and_the_first_does_not_count() -> None:
    order = []

    def first() -> None:
        order.append("first")
        time.sleep(0.05 if len(order) == 1 else 0)  # a warm-up, much longer than the calls that follow

    found = median_seconds({"first": first, "second": lambda: order.append("second")}, rounds=1)
    assert order == ["first", "second"] * 2
    assert found["first"] < 0.04
