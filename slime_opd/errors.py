"""The exceptions that slime_opd raises.

    SlimeOPDError
    ├── ConfigError (ValueError)         wrong or missing flags; train.py exits with code 2
    ├── DataError (ValueError)           a prompt file, a row or a field that cannot be used
    ├── EngineError (RuntimeError)       an SGLang server that does not start, answer or obey
    │   └── EngineTimeout                ... in the time it was given
    ├── TeacherError (RuntimeError)      teacher scores that cannot be had or trusted
    │   ├── TeacherMismatch              teacher and student do not share a vocabulary or tokenizer
    │   └── TooManyFallbacks             more samples than `--opd-max-fallback-fraction` went unscored
    ├── CheckpointError (RuntimeError)   a checkpoint that is missing, broken or of another model
    ├── WeightSyncError (RuntimeError)   an engine that does not serve the trainer's weights
    ├── NonFiniteError (RuntimeError)    a loss or gradient that stays infinite or NaN
    ├── RehearsalError (RuntimeError)     a rehearsal that cannot be held on this machine
    └── ProcessDied (RuntimeError)       a process of the run that is dead, or does not answer

Each also inherits the standard exception a caller would expect to catch. Each is built from
one message string, so it survives pickling across processes and Ray.
"""


class SlimeOPDError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(SlimeOPDError, ValueError):
    """One or more options are wrong; the message holds one line per problem."""


class DataError(SlimeOPDError, ValueError):
    """Input data, or a field of a sample, is not what the reader needs."""


class EngineError(SlimeOPDError, RuntimeError):
    """An SGLang server failed to start, answer or obey."""


class EngineTimeout(EngineError):
    """An SGLang server did not answer in the time it was given."""


class TeacherError(SlimeOPDError, RuntimeError):
    """Teacher scores cannot be had, or cannot be trusted."""


class TeacherMismatch(TeacherError):
    """Teacher and student do not share a vocabulary or a tokenizer."""


class TooManyFallbacks(TeacherError):
    """The share of unscored samples passed `--opd-max-fallback-fraction`."""


class CheckpointError(SlimeOPDError, RuntimeError):
    """A checkpoint is missing, broken, or belongs to another model."""


class WeightSyncError(SlimeOPDError, RuntimeError):
    """An engine does not serve the trainer's weights."""


class NonFiniteError(SlimeOPDError, RuntimeError):
    """The loss or the gradient was not finite for more steps in a row than `--max-skipped-steps`."""


class RehearsalError(SlimeOPDError, RuntimeError):
    """A step cannot be rehearsed here: no compiler, another build of torch, or code that the rehearsal cannot follow."""


class ProcessDied(SlimeOPDError, RuntimeError):
    """A process of the run is dead, ran out of memory, or has not answered for too long."""
