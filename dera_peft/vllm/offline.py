"""
vLLM's `LLM` as a program: lines of requests on standard input, lines of completions on standard output.

`dera generate` and `dera sweep` with `--engine vllm` start it (`dera_peft.remote.offline`), with the Python of the
environment that vLLM is in:

    python -m dera_peft.vllm.offline

The first line says which model; it is answered by a line `{"ready": true}` when that is loaded. From then on a line is
a request with an id, and a line of answers has those that were finished by a step of the engine. What is wrong is a
line `{"error": …}`, after which it ends. It ends with its input, too.
"""

import json
import os
import queue
import sys
import threading
from typing import IO, TYPE_CHECKING, Any

from dera_peft import __version__
from dera_peft.checkpoint.source import ModelSource
from dera_peft.errors import DeRaError
from dera_peft.vllm.command import engine_arguments
from dera_peft.vllm.versions import check_version

if TYPE_CHECKING:
    from vllm import LLM


def load(first: dict[str, Any]) -> "LLM":
    """
    The engine of the model that the first line names.

    Raises:
        DeRaError: it can't be decoded inside vLLM; or the line is of another version of this package.
    """
    if first["version"] != __version__:
        raise DeRaError(
            f"dera-peft {__version__} is in vLLM's environment, and {first['version']} in the one that asks: install "
            "the same version in both."
        )
    check_version()
    from vllm import LLM

    # tokens go in and out, and what ends a completion is said with each request
    return LLM(**model_arguments(first["source"]), skip_tokenizer_init=True, seed=0, **first["arguments"])


def model_arguments(source: dict[str, Any]) -> dict[str, Any]:
    """
    `engine_arguments`, and of a base alone what names it.

    Raises:
        DeRaError: see `engine_arguments`.
    """
    model = ModelSource.read(None, **source)
    record = model.resolve()
    if record.branches_differ or record.adapters:
        arguments = engine_arguments(**source)
        arguments.pop("tokenizer", None)
        return arguments
    given = {"revision": model.load_arguments().get("revision"), "trust_remote_code": model.trust_remote_code}
    return {"model": record.base, **{name: value for name, value in given.items() if value is not None}}


def answer(engine: "LLM", requests: "queue.Queue[dict[str, Any] | None]", answers: IO[str]) -> None:
    """Steps the engine, which takes requests as they come, until there are no more."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    steps, has_more = engine.llm_engine, True
    while has_more or steps.has_unfinished_requests():
        while has_more and (not steps.has_unfinished_requests() or not requests.empty()):
            request = requests.get()
            has_more = request is not None
            if request is not None:
                params = SamplingParams(
                    **request["sampling"], extra_args=request["extra"], detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )  # fmt: skip
                steps.add_request(str(request["id"]), {"prompt_token_ids": request["prompt"]}, params)
        if not steps.has_unfinished_requests():
            break
        finished = [
            {
                "id": int(output.request_id),
                "token_ids": list(output.outputs[0].token_ids),
                "finish_reason": output.outputs[0].finish_reason,
            }
            for output in steps.step()
            if output.finished
        ]
        if finished:
            write(answers, {"finished": finished})


def write(answers: IO[str], line: dict[str, Any]) -> None:
    answers.write(json.dumps(line) + "\n")
    answers.flush()


def read(requests: "queue.Queue[dict[str, Any] | None]") -> None:
    """Whoever asks writes without waiting for a step to end."""
    for line in sys.stdin:
        requests.put(json.loads(line))
    requests.put(None)


def main() -> int:
    # standard output is for answers alone: vLLM and its workers write where standard error goes
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    first = json.loads(sys.stdin.readline())
    try:
        engine = load(first)
        write(answers, {"ready": True})
        requests: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=read, args=[requests], daemon=True).start()
        answer(engine, requests, answers)
    except (DeRaError, ValueError) as error:  # vLLM's own refusals are a ValueError
        write(answers, {"error": str(error)})
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
