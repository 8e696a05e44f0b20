"""
DeRa inside vLLM: a plugin that forks each request inside the model, so that one DeRa request is one vLLM request.

Nothing here imports vLLM before it is used; the modules that need it are imported by vLLM's own processes.
"""


def register() -> None:
    """The entry point of the group `vllm.general_plugins`, which vLLM calls once in each of its processes."""
    from vllm import ModelRegistry

    from dera_peft.vllm.architectures import ARCHITECTURES
    from dera_peft.vllm.versions import installed_version, is_tested

    for name in ARCHITECTURES.values():
        # by name, since importing a model's class initialises its device
        ModelRegistry.register_model(name, f"dera_peft.vllm.models:{name}")
    if is_tested(installed_version()):  # with any other, `models` says so as soon as one of them is asked for
        from dera_peft.vllm.configure import configure_architectures

        configure_architectures()
