"""The one exception type for mistakes a user can mend."""


class UserError(ValueError):
    """A problem with what the user gave: the command line prints the message alone, without a stack trace."""
