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


# What libraries say, in errors of their own, where the system gives no more.
EXHAUSTED = {
    "can't allocate memory": "too little memory",
    "cannot allocate memory": "too little memory",
    "failed to allocate memory": "too little memory",
    "bad allocation": "too little memory",
    "bad_alloc": "too little memory",
    "could not create a primitive": "too little memory",  # oneDNN, of a product that it does know
    "failed to map segment": "too little memory",
    "error return without exception set": "too little memory",  # as extensions do that cannot even say so
    "can't start new thread": "the system starts no more threads",
    "no space left on device": "No space left on device",
    "too many open files": "Too many open files",
    "file too large": "File too large",
    "disk quota exceeded": "Disk quota exceeded",
}


def why_exhausted(error: BaseException) -> str | None:
    """What the system did not give, where an error says so."""
    if isinstance(error, MemoryError):
        return "too little memory"
    text = str(error).lower()
    return next((reason for said, reason in EXHAUSTED.items() if said in text), None)
