"""From what a client sent to what the engine computes: token ids, λ, sampling, grammar."""

import inspect
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from dera_peft.decoding.chats import TEMPLATE_ARGUMENTS, TOOLS, Chat, ChatError, chat_text, read_chat
from dera_peft.decoding.lambdas import Lambda
from dera_peft.decoding.prompts import token_ids
from dera_peft.decoding.sampling import Sampling
from dera_peft.engine.rules import LINEAR, Schedule, read_rule, read_schedule
from dera_peft.errors import DeRaError
from dera_peft.serve.bodies import MASK, ChatBody, CompletionBody, GenerationBody
from dera_peft.serve.errors import APIError, from_user_error
from dera_peft.serve.grammars import Grammars
from dera_peft.serve.lengths import check_ids, check_text
from dera_peft.serve.names import ModelNames
from dera_peft.serve.requests import GenerationRequest
from dera_peft.serve.tools import with_read_arguments

DEFAULT_TOKENS = 16  # new ones of /v1/completions, as OpenAI has it
UNBOUNDED = 4096  # new ones of a chat, where the model has no context that ends


@dataclass(frozen=True)
class EncodedPrompt:
    """
    Attributes:
        content: as it was sent: a text, token ids or messages.
        columns: what a chat's template is given beside the messages.
        ids: its token ids.
    """

    content: str | list[int] | Chat
    columns: dict[str, Any]
    ids: list[int]

    def echo(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """A text as it is; the text of token ids, special tokens written out."""
        return self.content if isinstance(self.content, str) else str(tokenizer.decode(self.ids))


@dataclass(frozen=True)
class Prepared:
    """
    Attributes:
        model: the name that the client used, or the plain one.
        requests: all samples of the first prompt, then those of the next.
    """

    model: str
    lam: Lambda | None
    seed: int
    prompts: list[EncodedPrompt]
    requests: list[GenerationRequest]


@dataclass(frozen=True)
class Preparer:
    """
    Args:
        rows: of the model's embedding: the ids of tokens that it knows are below it.
        context: the most tokens that a prompt and its completion may have together; None where nothing bounds them.
        max_completions: of one request: more could never wait at once.
    """

    tokenizer: PreTrainedTokenizerBase
    names: ModelNames
    grammars: Grammars
    rows: int
    context: int | None
    max_completions: int

    def completions(self, body: CompletionBody) -> Prepared:
        """Raises `APIError` where the request can't be answered."""
        self._check_completions(body, len(body.prompts))
        prompts = [EncodedPrompt(prompt, {}, self.encode(prompt)) for prompt in body.prompts]
        return self._prepare(body, prompts, DEFAULT_TOKENS)

    def chat(self, body: ChatBody) -> Prepared:
        """Raises `APIError` where the request can't be answered."""
        self._check_completions(body, 1)
        tools = body.tools if body.tool_choice == "auto" else []
        return self._prepare(body, [self.encode_chat(body.messages, tools, body.chat_template_kwargs)], None)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            check_text(self.tokenizer, prompt, self.context)
            ids = token_ids(self.tokenizer, prompt)
        else:
            ids = list(prompt)
        check_ids(ids, self.context)
        if not ids:
            raise APIError("prompt: it has no tokens", param="prompt")
        if unknown := [token for token in ids if not 0 <= token < self.rows]:
            raise APIError(
                f"prompt: {str(unknown[0])[:20]} is not the id of a token; the model has {self.rows}", param="prompt"
            )
        return ids

    def encode_chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], arguments: Mapping[str, Any]
    ) -> EncodedPrompt:
        if not self.tokenizer.chat_template:
            raise APIError(
                "the model has no chat template: use /v1/completions, or a model that was trained for chat",
                code="no_chat_template",
            )
        if own := [name for name in arguments if name in self._own_arguments]:
            raise APIError(
                f"chat_template_kwargs: {own[0]!r} is no variable of a template, and says how it is used",
                param=TEMPLATE_ARGUMENTS,
            )
        columns = {TOOLS: tools, TEMPLATE_ARGUMENTS: dict(arguments)}
        try:
            chat = read_chat(with_read_arguments(messages), "messages")
            check_text(self.tokenizer, chat_text(self.tokenizer, chat, columns), self.context, "messages")
            ids = token_ids(self.tokenizer, chat, columns)
            if tools and ids == token_ids(self.tokenizer, chat, {**columns, TOOLS: []}):
                raise APIError("tools: the model's chat template has no place for them", param="tools")
        except ChatError as error:
            raise APIError(str(error), param="messages") from None
        return EncodedPrompt(chat, {name: value for name, value in columns.items() if value}, ids)

    @cached_property
    def _own_arguments(self) -> set[str]:
        """What `apply_chat_template` takes beside a template's variables."""
        return {*inspect.signature(self.tokenizer.apply_chat_template).parameters} - {"documents"}

    def _check_completions(self, body: GenerationBody, prompts: int) -> None:
        """Raises `APIError` where there would be more than may ever wait."""
        if prompts * body.n > self.max_completions:
            raise APIError(
                f"n={body.n} of {prompts} prompts are more completions than the {self.max_completions} that may wait "
                "here: send several requests",
                param="n",
            )

    def _prepare(self, body: GenerationBody, prompts: list[EncodedPrompt], default: int | None) -> Prepared:
        lam, schedule = self._lambda(body)
        grammar = self.grammars.read(body.response_format)
        seed = secrets.randbits(64) if body.seed is None else body.seed & MASK
        if isinstance(body, CompletionBody) and body.echo:
            self._check_echo(body, bool(schedule))
        bias = tuple((int(token), float(value)) for token, value in body.logit_bias.items())
        requests = []
        for prompt in prompts if body.new_tokens != 0 else []:
            sampling = self._sampling(body, seed, self._new_tokens(len(prompt.ids), body.new_tokens, default))
            for sample in range(body.n):
                requests.append(
                    GenerationRequest(
                        tuple(prompt.ids),
                        None if schedule else lam,
                        combine=body.combine,
                        schedule=schedule,
                        sampling=sampling,
                        sample=sample,
                        stop=body.stops,
                        stop_token_ids=tuple(body.stop_token_ids),
                        ignore_eos=body.ignore_eos,
                        presence_penalty=body.presence_penalty,
                        frequency_penalty=body.frequency_penalty,
                        logit_bias=bias,
                        logprobs=body.num_logprobs,
                        stream=body.stream,
                        mask=None if grammar is None else self.grammars.mask(grammar),
                    )
                )
        return Prepared(body.model or self.names.plain, lam, seed, prompts, requests)

    def _check_echo(self, body: CompletionBody, has_schedule: bool) -> None:
        """Raises `APIError` where log-probabilities of prompts are not known exactly."""
        try:
            is_plain = read_rule(body.combine).name == LINEAR and not has_schedule
        except DeRaError as error:
            raise from_user_error(error, type(body).model_fields) from None
        if body.logprobs is not None and not is_plain:
            name = "lambda_schedule" if has_schedule else "combine"
            raise APIError(
                f"echo: log-probabilities of a prompt are those of plain λ: leave {name}, echo or logprobs away",
                param="echo",
            )

    def _lambda(self, body: GenerationBody) -> tuple[Lambda | None, Schedule]:
        """λ, and that over positions if it is not one throughout; then λ is its first."""
        lam, param = self.names.read(body.model, body.lam), "lambda_schedule"
        if not body.lambda_schedule:
            return lam, ()
        is_said = body.lam is not None or (body.model is not None and body.model not in self.names.listing(()))
        if is_said:
            raise APIError(f"{param}: λ is said beside it: leave one of the two away", param=param)
        given = body.lambda_schedule
        try:
            # the names of a JSON object are texts
            schedule = read_schedule(
                given if isinstance(given, str) else {_place(name): lam for name, lam in given.items()}
            )
        except DeRaError as error:
            raise APIError(str(error), param=param) from None
        for _, strength in schedule:
            self.names.number(strength, param)
        return schedule[0][1], schedule

    def _new_tokens(self, length: int, wanted: int | None, default: int | None) -> int:
        """As many as are asked for, or the default, or what there is room for."""
        if self.context is None:
            return wanted or default or UNBOUNDED
        room = self.context - length
        new = wanted or max(1, min(room, default or room))
        if new > room:
            way_out = f"at most {room} new tokens fit behind it" if room > 0 else "shorten it"
            raise APIError(
                f"the prompt has {length} tokens, which with {new} new ones is more than the model's context of "
                f"{self.context}; {way_out}",
                param="max_tokens" if room > 0 else "prompt",
                code="context_length_exceeded",
            )
        return new

    def _sampling(self, body: GenerationBody, seed: int, new_tokens: int) -> Sampling:
        try:
            return Sampling(
                max_new_tokens=new_tokens,
                temperature=body.temperature,
                top_k=max(0, body.top_k),
                top_p=body.top_p,
                min_p=body.min_p,
                repetition_penalty=body.repetition_penalty,
                seed=seed,
            )
        except DeRaError as error:
            raise from_user_error(error, type(body).model_fields) from None


def _place(name: str) -> int | str:
    """A position that is written as numbers are; another text as it is, which is none."""
    return int(name) if name.isascii() and name.isdecimal() and len(name) < 19 else name
