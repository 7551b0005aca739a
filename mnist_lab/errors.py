"""The two ways in which a run ends early for a reason worth one line instead of a traceback."""


class UserError(ValueError):
    """The user's input is wrong: the message names the value, what is allowed and what to do."""


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number: the message names the model, epoch and step."""
