"""What clients send: OpenAI's requests, with λ."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dera_peft.engine.rules import LINEAR

# fields of OpenAI's and of its clients that say nothing of the text
HARMLESS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
}  # fmt: skip
# what asks for nothing is nothing to refuse
NOTHING: dict[str, tuple] = {
    "best_of": (1,),
    "suffix": ("",),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("none", "auto"),
}
_PROMPTS = "a prompt of the reference's own is not served; dera generate takes one"
# what is known, and can't be held: the way out
NOT_SERVED = {
    "principle": _PROMPTS,
    "reference_system": _PROMPTS,
    "parallel_tool_calls": "how many calls an answer has is the model's choice; leave it away",
    "functions": "they are the older form of tools",
    "function_call": "it is the older form of tool_choice",
}
MASK = (1 << 64) - 1  # a seed of OpenAI's may be negative
MAX_LOGPROBS = 20
MAX_PROMPTS, MAX_STOPS, MAX_BIAS = 2048, 64, 100

# the first thing that is wrong in a list is told, and the rest not looked at: of millions it would take minutes
Ids = Annotated[list[int], Field(fail_fast=True)]
StopIds = Annotated[list[int], Field(fail_fast=True, max_length=MAX_STOPS)]
Stops = Annotated[list[str], Field(fail_fast=True, max_length=MAX_STOPS)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True, max_length=MAX_PROMPTS)]
ManyIds = Annotated[list[Ids], Field(fail_fast=True, max_length=MAX_PROMPTS)]


def check_bias(bias: dict[str, Any]) -> dict[str, float]:
    """Raises `ValueError` where one is none."""
    for token, value in bias.items():
        if not (token.isascii() and token.isdecimal()) or len(token) > 18 or token != str(int(token)):
            raise ValueError(f"{token[:20]!r} is not the id of a token")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not abs(value) <= MAX_BIAS:
            raise ValueError(f"of token {token} must be a number from -{MAX_BIAS} to {MAX_BIAS}")
    return bias


def check_tool_choice(choice: Any) -> Any:
    """Raises `ValueError` for what would force a call: how a model writes one is not known of every model."""
    if choice == "required" or isinstance(choice, dict):
        raise ValueError(
            "'auto' and 'none' are served; for arguments that a tool takes, give its parameters as response_format "
            '{"type": "json_schema", "json_schema": {"schema": …}}'
        )
    return choice


def texts_in(value: Any) -> Iterator[str]:
    """All texts of what JSON can say, those of names too."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            left += part.keys()
            left += part.values()
        elif isinstance(part, list) and not {*map(type, part)} <= {int}:  # of token ids there are millions
            left += part


class Body(BaseModel):
    """Unknown fields are refused: they may change the text. A field that is null is a field that is not there."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def without_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        try:
            for text in texts_in(values):
                text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("a text is not valid UTF-8: it has half of a character") from None
        known = {field.alias or name for name, field in cls.model_fields.items()}
        said = {
            name: value
            for name, value in values.items()
            if value is not None and name not in HARMLESS and value not in NOTHING.get(name, ())
        }
        unknown = [name for name in said if name not in known][:1]  # one is enough to be told of
        if unknown and unknown[0] in NOT_SERVED:
            raise ValueError(f"{unknown[0]}: {NOT_SERVED[unknown[0]]}")
        return {name: value for name, value in said.items() if name in known or name in unknown}


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # OpenAI's padding against eavesdroppers; none is sent


class GenerationBody(Body):
    """
    What both endpoints take. Ranges of the settings of sampling are those of `Sampling`, which checks them.

    Attributes:
        lam: `lambda`; `ModelNames.read` checks it.
        combine, lambda_schedule: as of `DeRaModel.generate`: "kl:0.05"; {"0": 2, "20": 1} or "0:2,20:1".
        return_token_ids: put `token_ids` into each choice, and `prompt_token_ids` beside them; with a rule or a
            schedule also `token_lambda`, the λ that it gave each token.
    """

    model: str | None = None
    lam: Any = Field(None, alias="lambda")
    combine: str = LINEAR
    lambda_schedule: str | dict[str, Any] = {}
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = Field(0, ge=-1)  # vLLM's -1 is off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Any], AfterValidator(check_bias)] = {}
    seed: int | None = None
    n: int = Field(1, ge=1, le=128)
    stop: str | Stops = []
    stop_token_ids: StopIds = []
    ignore_eos: bool = False
    max_tokens: int | None = Field(None, ge=0)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    response_format: dict[str, Any] | None = None
    return_token_ids: bool = False

    @model_validator(mode="after")
    def agrees(self) -> "GenerationBody":
        if "stream_options" in self.model_fields_set and not self.stream:
            raise ValueError("stream_options: they are for stream=true")
        if not all(self.stops):
            raise ValueError("stop: an empty text would end every completion")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def new_tokens(self) -> int | None:
        """The most new tokens, where the request says it."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many of the most probable tokens to report beside the drawn one; None for no log-probabilities at all."""
        raise NotImplementedError


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: str | Ids | Texts | ManyIds
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def has_prompts(self) -> "CompletionBody":
        if isinstance(self.prompt, list) and not self.prompt:
            raise ValueError("prompt: the list is empty")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 is for echo=true alone")
        if self.echo and self.stream and self.logprobs is not None:
            raise ValueError("echo: with logprobs it can't be streamed")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several, as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return self.prompt if isinstance(self.prompt[0], (str, list)) else [self.prompt]

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[Objects, Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    tools: Objects = []
    tool_choice: Annotated[Literal["none", "auto"], BeforeValidator(check_tool_choice)] = "auto"
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def says_one_thing(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: it needs logprobs=true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens: it and max_completion_tokens are two names of one limit, and differ")
        return self

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class TokensBody(Body):
    """
    `POST /dera/tokens`: a prompt (or messages) and a completion.

    Attributes:
        completion: token ids as they were drawn, or a text.
        top: how many of each branch's most probable tokens to tell.
    """

    model: str | None = None
    lam: Any = Field(None, alias="lambda")
    prompt: str | Ids | None = None
    messages: Objects = []
    tools: Objects = []
    chat_template_kwargs: dict[str, Any] = {}
    completion: Annotated[str | Ids, Field(min_length=1)]
    top: int = Field(3, ge=1, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def has_one_prompt(self) -> "TokensBody":
        if (self.prompt is None) == (not self.messages):
            raise ValueError("give prompt or messages")
        return self
