"""The one exception type for mistakes a user can mend."""


class UserError(ValueError):
    """A problem with what the user gave: the command line prints the message alone, without a stack trace."""


def expect_at_least(least: int, **values: float | None) -> None:
    """Raise a :class:`UserError` that names the first of ``values`` below ``least``; None is left alone."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise UserError(f"{name}: expected {least} or more, got {value}")
