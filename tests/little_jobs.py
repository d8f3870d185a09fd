"""Jobs for worker processes; imports nothing, so that workers start fast."""
import os


def double(job):
    if job["n"] in (5, 6, 7):
        os._exit(7)
    if job["n"] == 99:
        raise ValueError("odd job")
    print("chatter on standard output")
    return {"twice": 2 * job["n"]}


def halved(number: int, work) -> int:
    """A measurement of `vqlora.cost.apart`."""
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number // 2
