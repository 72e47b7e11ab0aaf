"""Calls end in bounded time, wherever they are made."""

import threading
import time

import pytest

from folojax.text.time_limit import call_within


def forever() -> None:
    while True:
        pass


def stubborn() -> None:
    while True:
        try:
            forever()
        except Exception:
            continue


def fail() -> None:
    raise KeyError("its own")


def threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "folojax-time-limit"]


def test_results_and_errors_come_through() -> None:
    assert call_within(60, lambda: 5) == 5
    assert call_within(60, lambda: None) is None
    with pytest.raises(KeyError, match="its own"):
        call_within(60, fail)


@pytest.mark.parametrize("function", [forever, stubborn])
def test_a_loop_is_ended_and_its_thread_with_it(function: object) -> None:
    assert callable(function)
    with pytest.raises(TimeoutError, match=r"longer than 0\.1 s"):
        call_within(0.1, function)
    assert not threads()


def test_it_works_in_any_thread() -> None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            call_within(0.1, forever)
        except TimeoutError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert len(caught) == 1
    assert not threads()


def test_what_does_not_hear_is_left_behind() -> None:
    with pytest.raises(TimeoutError):
        call_within(0.1, lambda: time.sleep(3))
    assert threads(), "the call has waited for what it gave up"
    for thread in threads():  # it does hear, once it is back from C
        thread.join(30)
    assert not threads()
