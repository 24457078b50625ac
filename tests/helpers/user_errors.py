"""The message with which a call is refused."""

from collections.abc import Callable

import pytest

from minigpt4_jax.errors import UserError


def refused(call: Callable[..., object], *args: object, **options: object) -> str:
    """The UserError that the call raises: one line."""
    with pytest.raises(UserError) as e:
        call(*args, **options)
    assert "\n" not in str(e.value)
    return str(e.value)
