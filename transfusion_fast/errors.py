"""The one exception that a user's input raises, and that a command line prints as one line."""


class InputError(ValueError):
    """What a user gave cannot be used: the message says what, the value got, the rule, and what to do."""
