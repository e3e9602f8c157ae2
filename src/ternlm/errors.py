"""Everything ternlm raises on purpose, with the exit code each one ends the process with.

A message is one clear sentence: the value, the rule, and the way out. The command line prints
it without a traceback; library users catch `TernlmError` or a branch of it.

    TernlmError                1   unexpected, or a failed gate
    |- SettingsError           2   the settings are refused, nothing was started
    |- EnvironmentFault        3   the machine, a missing extra, an unwritable folder
    |  |- DataError            3   documents, shards
    |  |- TokenizerError       3   tokenizer files, or the wrong tokenizer for a checkpoint
    |  |- CheckpointError      3   missing, damaged or foreign checkpoints
    |  `- StorageFault         3   a checkpoint cannot be written; earlier ones are good
    |- Diverged                4   non-finite loss or gradient; the last good checkpoint is kept
    |- MemoryExhausted         5   out of memory; the message names the overrides that help
    |- Preempted              75   SIGTERM arrived and the run was saved
    `- Interrupted           130   Ctrl-C arrived and the run was saved
"""


class TernlmError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class SettingsError(TernlmError):
    """A setting is unknown, malformed, or contradicts another; nothing was started."""

    exit_code = 2


class EnvironmentFault(TernlmError):
    """The machine lacks something: a package, a device, disk space, a writable folder."""

    exit_code = 3


class DataError(EnvironmentFault):
    """Documents or token shards are missing, empty, unreadable or damaged."""


class TokenizerError(EnvironmentFault):
    """A tokenizer cannot be loaded, or does not belong to the checkpoint it is used with."""


class CheckpointError(EnvironmentFault):
    """A checkpoint is missing, incomplete, damaged, or was written for another model."""


class StorageFault(EnvironmentFault):
    """The disk is full or failing, so a checkpoint was not written; earlier ones are untouched."""


class Diverged(TernlmError):
    """Training produced non-finite numbers; the last good checkpoint is kept."""

    exit_code = 4


class MemoryExhausted(TernlmError):
    """The device ran out of memory; the message names the overrides that help."""

    exit_code = 5


class Preempted(TernlmError):
    """SIGTERM arrived; the run was saved and can be resumed."""

    exit_code = 75


class Interrupted(TernlmError):
    """Ctrl-C arrived; the run was saved and can be resumed."""

    exit_code = 130


def missing_extra(package: str, extra: str, purpose: str) -> EnvironmentFault:
    """The error for an optional package that is not installed, with the command that installs it."""
    return EnvironmentFault(
        f"{purpose} needs the package '{package}', which is not installed. "
        f"Install it with: pip install 'ternlm[{extra}]'"
    )
