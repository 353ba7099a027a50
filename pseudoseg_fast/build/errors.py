"""The error of the native build."""


class BuildError(RuntimeError):
    """A native library is not there and could not be built or loaded; the text says why and what to do."""


REMEDY = "or set PSEUDOSEG_BACKEND=eager to run without native kernels"
