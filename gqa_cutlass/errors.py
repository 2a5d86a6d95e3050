"""Every error the package raises.

All of them say what was wrong, what was given, what is allowed and what to do about it.
"""


class GqaError(Exception):
    """Root of the package's errors."""


class ConfigError(GqaError, ValueError):
    """A kernel configuration breaks a rule; the message names the rule."""


class InputError(GqaError, ValueError):
    """An argument of a call is not allowed. Nothing was launched and nothing was written."""


class CacheOverflowError(InputError):
    """A sequence does not fit into its cache. Its cache rows are untouched."""


class OutOfPagesError(CacheOverflowError):
    """A pool has fewer free pages than are needed. None was taken, and nothing was written.

    Attributes:
        asked: Pages that were needed.
        free: Pages that were free.
        missing: How many more would have had to be.
    """

    def __init__(self, message: str, asked: int = 0, free: int = 0) -> None:
        super().__init__(message)
        self.asked, self.free, self.missing = asked, free, asked - free


class CacheAllocationError(GqaError, MemoryError):
    """There is not enough memory for a cache, or for what a method of it needs meanwhile.

    Nothing stays allocated, and a cache holds what it held.
    """


class CompileError(GqaError, RuntimeError):
    """NVRTC rejected a kernel; the message carries the compiler's log."""


class CompilerMissingError(GqaError, RuntimeError):
    """NVRTC, or a header it needs, is not installed."""


class KernelMissingError(GqaError, RuntimeError):
    """A kernel was not found compiled, and compiling it is not allowed here."""


class StoreError(GqaError, RuntimeError):
    """The cubin store cannot be used."""


class OutputError(GqaError, OSError):
    """Files cannot be written where they should go."""


class ExportError(OutputError):
    """A bundle for C and Rust cannot be written where it should go."""


class DeviceError(GqaError, RuntimeError):
    """There is no usable GPU: none at all, one too old, or a driver too old."""


class LaunchError(GqaError, RuntimeError):
    """The CUDA driver refused a kernel."""


class PtxError(GqaError, ValueError):
    """PTX that ptxsim cannot run: cut short, or with something it does not know."""


class CollectiveError(GqaError, RuntimeError):
    """An exchange between ranks failed: one is gone, or did not come in time."""


class KernelFault(GqaError, RuntimeError):
    """A kernel in ptxsim did what no kernel may: the message says what, where and who."""


def shown(value: object) -> str:
    """A value as messages say it: 80 characters at most, whatever it is and does."""
    try:
        return repr(value)[:80]
    except Exception:  # of a caller's class, or an int of too many digits
        return f"a {type(value).__name__} that cannot be shown"
