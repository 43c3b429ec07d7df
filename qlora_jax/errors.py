"""The failures a user can cause and mend.

Anything else that is raised is a defect of this library. The command line prints these
as one paragraph and exits with status 1; every other exception keeps its traceback.
"""


class UserError(ValueError):
    """A value, file or setting the user gave cannot be used.

    The message says what was expected, what came, and what to do next.
    """


class CheckpointError(UserError):
    """A checkpoint, adapter or tokenizer on disk is missing, damaged or not understood.

    The message names the file, and the tensor or field in it.
    """
