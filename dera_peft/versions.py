"""The versions of the packages that a result depends on."""

from importlib.metadata import version

PACKAGES = ("dera-peft", "torch", "transformers", "peft")


def package_versions(*more: str) -> dict[str, str]:
    """By name, those of further packages too."""
    return {name: version(name) for name in (*PACKAGES, *more)}
