"""The exception tree: everything that can go wrong at the border, with what to do about it.

    MoespacError                 any failure a user can act on; the CLI prints it as one line, exit code 2
    ├── ConfigError              a value that cannot be used (NaN temperature, unknown policy, budget too small ...)
    ├── ModelError               the model path is missing, is not a MoE, or its family is not supported
    │   └── DraftError           the draft model does not fit the target (another vocabulary ...)
    ├── CheckpointError          a file is truncated, corrupt or incomplete
    ├── PackError                packing stopped (disk full ...); what was there before is untouched
    ├── StorageError             reading an expert failed while decoding; the engine stays usable
    └── DeviceMemoryError        the accelerator's memory is used up, without experts even; the engine stays usable

Broken invariants inside the program are assertions, not members of this tree.
"""


class MoespacError(Exception):
    """A failure that the user can act on. Its text is one line: what is wrong, then what to do."""


class ConfigError(MoespacError):
    """A setting that cannot be used."""


class ModelError(MoespacError):
    """A model that is missing, is not a Mixture-of-Experts, or is of an unsupported family."""


class DraftError(ModelError):
    """A draft model that does not fit the target."""


class CheckpointError(MoespacError):
    """A checkpoint or packed file that is truncated, corrupt or incomplete."""


class PackError(MoespacError):
    """Packing stopped before it was complete; nothing that existed before was changed."""


class StorageError(MoespacError):
    """An expert could not be read from storage while decoding."""


class DeviceMemoryError(MoespacError):
    """The accelerator's memory did not suffice for what is not experts."""
