"""The exception tree. Every error says what, where and what to do in one sentence."""


class PodwireError(Exception):
    """Root of all errors that podwire raises on purpose.

    `object` names the object concerned (``kind namespace/name``), `field` the path inside it;
    both may be empty.
    """

    def __init__(self, message: str, *, object: str = "", field: str = "") -> None:
        where = " ".join(part for part in (object, field) if part)
        super().__init__(f"{where}: {message}" if where else message)
        self.object = object
        self.field = field


class InvalidObject(PodwireError):
    """An API object that makes no sense: it is set aside, named in the status, never fatal."""


class ConfigError(PodwireError):
    """Bad flags, configuration files or manifests."""


class KernelError(PodwireError):
    """The kernel refused a request. `errno` is positive; `extack` is the kernel's own sentence."""

    def __init__(self, message: str, *, errno: int = 0, extack: str = "") -> None:
        super().__init__(f"{message}: {extack}" if extack else message)
        self.errno = errno
        self.extack = extack


class Unsupported(PodwireError):
    """This kernel or machine lacks a feature; the message names the feature and what needs it."""


class ApiError(PodwireError):
    """The Kubernetes API answered with an error. `status` is the HTTP status (0: no answer)."""

    def __init__(self, message: str, *, status: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
