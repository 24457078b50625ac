"""Rounding sizes up."""


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least n."""
    return -(-n // multiple) * multiple


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... up to the smallest that is at least n."""
    return [1 << i for i in range(next_power_of_two(n).bit_length())]
