"""The ways in which a run ends early for a reason worth one line instead of a traceback."""


class UserError(ValueError):
    """The user's input is wrong: the message names the value, what is allowed and what to do."""


class FolderInUse(UserError):
    """Another run is at work in a folder."""


class RunFailed(RuntimeError):
    """The run cannot go on, through no fault of the input; the message says why."""


class TrainingDiverged(RunFailed):
    """The loss is no longer a finite number: the message names the model, epoch and step."""


class WrongPrecision(RunFailed):
    """An engine does not run a model's products in the precision that its row claims."""
