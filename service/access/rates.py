"""Rates as text: how many requests in what time."""

from functools import lru_cache

from limits import RateLimitItem, parse_many


@lru_cache(1024)
def parse_rate(text: str) -> RateLimitItem:
    """`1000/second`, `50 per 10 minutes`, … Raises ValueError, with a sentence, for anything else."""
    try:
        rate, *more = parse_many(text)
    except ValueError:
        rate, more = None, []
    if rate is None or more or rate.amount < 1:
        raise ValueError("a rate is a number of requests in a time, such as 100/second, 5000/hour or 50/10 minutes")
    return rate
