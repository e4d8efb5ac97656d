"""The one place that asks which packages are installed, and in which version."""

from importlib.metadata import PackageNotFoundError, version


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, without importing it; `None` if it is not installed.

    >>> installed_version("peft") is not None
    True
    >>> installed_version("no-such-distribution") is None
    True
    """
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
