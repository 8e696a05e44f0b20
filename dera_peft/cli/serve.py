"""`dera serve`: an OpenAI server with λ on every request."""

from dera_peft.serve.settings import ServeSettings


def serve(settings: ServeSettings) -> None:
    """Serve the model over HTTP, as OpenAI's API does, with a strength λ on every request; and a page to try it.

    λ is the field "lambda" of a request (a number, or numbers by adapter), or part of the model's name: "dpo@0.5". The
    page is at http://127.0.0.1:8000/. SIGTERM or Ctrl-C finishes what is under way, and ends.

    **Examples**

    `dera serve --adapter runs/tiny/dpo`

    `dera serve --base org/base --adapter helpful=./helpful --adapter harmless=./harmless --quantization nf4`

    `dera serve --adapter ./dpo --host 0.0.0.0 --api-key-file key.txt --allow-origin https://chat.example.org`

    `dera serve --engine vllm --adapter ./dpo --tensor-parallel-size 2 --quantization fp8`
    """
    settings.check()
    if settings.engine == "vllm":
        from dera_peft.vllm.command import serve as become_vllm

        become_vllm(settings)
    else:
        from dera_peft.serve.server import serve as run  # torch, and the extra's packages

        run(settings)
