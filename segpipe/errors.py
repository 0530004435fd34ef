"""Every error that segpipe raises on purpose, as one tree.

    SegpipeError
    ├── RequestError        the user's mistake: one line with the fix, exit code 2
    │   ├── ConfigError     a setting is unknown, of the wrong type or out of range
    │   ├── InputError      the input is missing, empty or of no known kind
    │   ├── WeightsError    the weights cannot be had or do not fit the model
    │   ├── OutputError     the output belongs to another tool, version or run, or cannot be written
    │   ├── PlaceError      no store answers to a URI of this kind
    │   └── RunLockedError  another process is working on the same run
    ├── StoreError          storage or network fault that outlived its retries
    ├── LeaseLostError      another process took this run over
    ├── HopelessError       nearly all images of a run fail
    ├── ShardCorruptError   the bytes of a shard cannot be read any further
    └── ImageRejectedError  one image cannot be used; it becomes a failed row

Anything else that escapes is a bug and keeps its traceback.
"""

from segpipe.records import ImageHeader


class SegpipeError(Exception):
    """Base of every error that segpipe raises on purpose."""


class RequestError(SegpipeError):
    """The request was wrong; the message names the value, what is allowed, and the fix."""


class ConfigError(RequestError):
    """A setting is unknown, of the wrong type or out of range."""


class InputError(RequestError):
    """The input is missing, empty or of no known kind."""


class WeightsError(RequestError):
    """The weights cannot be had or do not fit the model."""


class OutputError(RequestError):
    """The output place belongs to another tool, a newer version or another configuration."""


class PlaceError(RequestError):
    """No store answers to a URI of this kind: the scheme is unknown, or its client is not installed."""


class RunLockedError(RequestError):
    """Another living process holds the lease of this run."""


class StoreError(SegpipeError):
    """Storage or network fault that outlived its retries: the work stays pending, nothing is recorded."""


class LeaseLostError(SegpipeError):
    """Another process took this run over while this one was working."""


class HopelessError(SegpipeError):
    """Nearly all images of a run fail: its input is probably another one than was meant."""


class ShardCorruptError(SegpipeError):
    """The bytes of a shard cannot be read any further; what was read before stands.

    Attributes:
        error_type: short name of what went wrong, as stored in `images.error_type`.
    """

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(message)
        self.error_type = error_type


class ImageRejectedError(SegpipeError):
    """One image cannot be used; it becomes a `failed` row.

    Attributes:
        error_type: short name of what went wrong, as stored in `images.error_type`.
        header: what was known of the image before it failed.
    """

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(message)
        self.error_type = error_type
        self.header: ImageHeader | None = None
