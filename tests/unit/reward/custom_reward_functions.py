"""Rewards as a user would write them, for `--custom-rm-path`."""

import threading

NOT_A_FUNCTION = 1


def length(sample):
    return len(sample.response)


async def length_async(sample):
    return float(len(sample.response))


def sync_that_returns_a_coroutine(sample):
    return length_async(sample)


def is_on_another_thread(sample):
    return threading.current_thread() is not threading.main_thread()


def raises(sample):
    raise KeyError("score")


def not_a_number(sample):
    return float("nan")


def a_dict(sample):
    return {"score": 1.0}
