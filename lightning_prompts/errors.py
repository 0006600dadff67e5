"""The one exception for a person's mistake."""


class UserError(ValueError):
    """A mistake of the person who runs the program.

    Its message is one sentence that says what was given, what is allowed and what to do. The command line prints it without a
    traceback and exits with code 2.
    """
