"""The exceptions that slime_opd raises.

    SlimeOPDError
    ├── ConfigError (ValueError)         wrong or missing flags; train.py exits with code 2
    ├── DataError (ValueError)           a prompt file, row or field is not usable
    ├── EngineError (RuntimeError)       an SGLang server did not start, or a request to it failed
    │   └── EngineTimeout                ... because of a time limit
    ├── TeacherError (RuntimeError)      teacher scores are not available or not plausible
    │   ├── TeacherMismatch              teacher and student have different vocabularies or tokenizers
    │   └── TooManyFallbacks             more samples without scores than `--opd-max-fallback-fraction`
    ├── CheckpointError (RuntimeError)   a checkpoint is missing, damaged or of another model
    ├── WeightSyncError (RuntimeError)   an engine does not serve the trainer's weights
    ├── NonFiniteError (RuntimeError)    loss or gradient are infinite or NaN for too many steps
    ├── RehearsalError (RuntimeError)    this machine cannot rehearse a step
    └── ProcessDied (RuntimeError)       a process of the run is dead, or does not answer

Each one also inherits from the standard exception that a caller would catch. Each is built from one message, so that it
can be pickled, which Ray does.
"""


class SlimeOPDError(Exception):
    """Base class of the errors of this package."""


class ConfigError(SlimeOPDError, ValueError):
    """One or more flags are wrong; the message has one line per problem."""


class DataError(SlimeOPDError, ValueError):
    """A data file, a row, or a field of a sample is not usable."""


class EngineError(SlimeOPDError, RuntimeError):
    """An SGLang server did not start, or a request to it failed."""


class EngineTimeout(EngineError):
    """An SGLang server did not start or answer within its time limit."""


class TeacherError(SlimeOPDError, RuntimeError):
    """Teacher scores are not available, or not plausible."""


class TeacherMismatch(TeacherError):
    """Teacher and student have different vocabularies or tokenizers."""


class TooManyFallbacks(TeacherError):
    """The fraction of samples without teacher scores is above `--opd-max-fallback-fraction`."""


class CheckpointError(SlimeOPDError, RuntimeError):
    """A checkpoint is missing, damaged, or of another model."""


class WeightSyncError(SlimeOPDError, RuntimeError):
    """An engine does not serve the trainer's weights."""


class NonFiniteError(SlimeOPDError, RuntimeError):
    """The loss or the gradient was not finite for more steps in a row than `--max-skipped-steps`."""


class RehearsalError(SlimeOPDError, RuntimeError):
    """A step cannot be rehearsed: no compiler, an unsupported build of torch, or unsupported code in the step."""


class ProcessDied(SlimeOPDError, RuntimeError):
    """A process of the run is dead, ran out of memory, or has not answered for too long."""
