"""A quick check before a long sweep: does the adapter respond to λ, and where does text fall apart?"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from dera_peft.checkpoint.devices import device_map_of, join_processes
from dera_peft.decoding.lambdas import Lambda, NamedLambda, values_of, with_values
from dera_peft.decoding.prompts import read_prompts
from dera_peft.decoding.requests import Completion, Request
from dera_peft.decoding.scoring import score_each
from dera_peft.evaluate.arms import make_arms
from dera_peft.evaluate.config import SweepConfig
from dera_peft.evaluate.points import ends, is_as_trained, is_reference
from dera_peft.evaluate.run import encode_prompts
from dera_peft.progress import Progress, no_progress
from dera_peft.remote.decoders import open_decoder
from dera_peft.rewards.metrics import perplexity_of, repetition

PROMPTS, TOKENS = 8, 64  # at most so many prompts, and tokens a completion
LAMBDAS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # checked as well as the sweep's own
NO_RESPONSE, WEAK_RESPONSE = 1e-5, 1e-3  # nats a token, of KL(aligned ‖ reference)
# text counts as fallen apart where, against the worse one of the reference and the aligned model,
PERPLEXITY_FACTOR = 4.0  # its perplexity under the reference is more than so many times as high, or
ADDED_REPETITION = 0.25  # more than that share more of its 4-grams are repetitions


@dataclass(frozen=True)
class CheckedLambda:
    """
    One λ.

    Attributes:
        kl_per_token: KL(π_λ ‖ π_ref) in nats, over all tokens of its completions.
        perplexity: of its completions under the reference, over all their tokens.
        repetition: share of a completion's 4-grams that stood in it before, mean.
        same: share of the completions that are the reference's, letter by letter.
        falls_apart: whether they are much less fluent, or repeat themselves much more, than at λ=0 and λ=1.
    """

    lam: Lambda
    kl_per_token: float
    perplexity: float
    repetition: float
    same: float
    falls_apart: bool = False


@dataclass(frozen=True)
class Check:
    """
    What the check showed.

    Attributes:
        lambdas: ascending; of several adapters also each alone.
        prompts, tokens: how many were used, and the longest that a completion could become.
        prompts_differ: whether the branches have prompts of their own.
        kl_per_token: KL(π_1 ‖ π_ref) in nats: how far apart the branches are; of several adapters the least one's.
    """

    lambdas: list[CheckedLambda]
    prompts: int
    tokens: int
    prompts_differ: bool = False

    @property
    def kl_per_token(self) -> float:
        return min(_at_1(ray).kl_per_token for ray in self.rays().values())

    @property
    def responds(self) -> bool:
        return self.kl_per_token >= NO_RESPONSE

    def rays(self) -> dict[str, dict[float, CheckedLambda]]:
        """Adapter -> its λ, ascending, where every other adapter's is 0; a single adapter is called ""."""
        rays: dict[str, dict[float, CheckedLambda]] = {}
        for each in self.lambdas:
            if not isinstance(each.lam, NamedLambda):
                rays.setdefault("", {})[each.lam] = each
                continue
            for name, value in each.lam.items():
                if is_reference(NamedLambda({**each.lam, name: 0.0})):
                    rays.setdefault(name, {})[value] = each
        return {name: dict(sorted(ray.items())) for name, ray in rays.items()}

    def text(self) -> str:
        """Plain sentences, one a line."""
        lines = [
            line
            for name, ray in self.rays().items()
            for line in _told(f"The adapter {name!r}" if name else "The adapter", ray, self.prompts_differ)
        ]
        mixed = [each for each in self.lambdas if sum(map(bool, values_of(each.lam))) > 1]
        if mixed:
            broken = "; ".join(f"{each.lam:g}" for each in mixed if each.falls_apart)
            lines.append(f"Of the points of several adapters text falls apart at {broken or 'none'}.")
        if self.responds or len(lines) > 1:
            lines.append(
                f"(Falling apart: a perplexity under the reference more than {PERPLEXITY_FACTOR:g} times, or a "
                f"repetition more than {ADDED_REPETITION:g} above, the highest one of λ=0 and λ=1. {self.prompts} "
                f"prompts, at most {self.tokens} tokens each: a first look, no measurement.)"
            )
        return "\n".join(lines)


def _at_1(ray: dict[float, CheckedLambda]) -> CheckedLambda:
    return ray[1.0]


def _told(adapter: str, ray: dict[float, CheckedLambda], prompts_differ: bool) -> list[str]:
    """Whether an adapter responds to its λ, and where text falls apart."""
    distance = _at_1(ray).kl_per_token
    apart = f"at λ=1 its next-token distributions are {distance:.2g} nats a token (KL) from the reference's"
    adapter = "The model" if prompts_differ else adapter
    if distance < NO_RESPONSE:
        asks = "do the prompts differ?" if prompts_differ else "is it the right adapter, and was it trained?"
        return [f"{adapter} does not respond to λ: {apart}. Every λ writes what the reference writes; {asks}"]
    if distance < WEAK_RESPONSE:
        lines = [f"{adapter} hardly responds to λ: {apart}. A sweep needs large λ, or many samples, to see it."]
    else:
        lines = [f"{adapter} responds to λ: {apart}."]
    up = [lam for lam, each in ray.items() if each.falls_apart and lam > 0]
    down = [lam for lam, each in ray.items() if each.falls_apart and lam < 0]
    if up:
        holds = max(lam for lam in ray if lam < min(up))
        lines.append(f"Text falls apart from λ={min(up):g} on: sweep up to about λ={holds:g}.")
    if down:
        lines.append(f"Below 0 it falls apart from λ={max(down):g} on.")
    if not up and not down:
        lines.append(f"Text holds together at every λ that was tried, from {min(ray):g} to {max(ray):g}.")
    return lines


def check(config: SweepConfig, progress: Progress = no_progress) -> Check | None:
    """
    Decodes a few prompts at the sweep's λ and some larger ones; needs neither rewards nor an output folder.

    Returns:
        What it showed; None in all processes but the first one, which does it alone.
    """
    processes = join_processes()
    if not processes.is_main_process:
        return None
    limit = min(PROMPTS, config.max_prompts or PROMPTS)
    arm, *_ = make_arms(config)  # which refuses of the others what the sweep would
    config = replace(config, arms=(), max_new_tokens=min(TOKENS, config.max_new_tokens))
    prompts = read_prompts(config.prompts, config.prompt_column, config.split, config.subset, limit)
    tokenizer, tokens, reference_tokens = encode_prompts(config, arm, prompts)
    load = cache(lambda: arm.load(device_map_of(config.device_map, processes)))
    own = [lam for lam in arm.lambdas if lam is not None]
    alone = [with_values(end, (lam * value for value in values_of(end))) for end in ends(own[0])[1:] for lam in LAMBDAS]
    completions_at: dict[Lambda | None, list[Completion]] = defaultdict(list)
    with open_decoder(config, arm.source, tokenizer, load, config.batch_size, scores=True) as decoder:
        low, high = decoder.lambda_range
        further = [lam for lam in alone if all(low <= value <= high for value in values_of(lam))]
        lambdas = sorted({*own, *further}, key=values_of)
        requests = [Request(prompt.index, lam) for lam in lambdas for prompt in prompts]
        with progress("decoding", len(requests), 0) as advance:
            for batch in decoder.decode(tokens, requests, config.sampling, reference_prompts=reference_tokens):
                for each in batch:
                    completions_at[each.request.lam].append(each)
                advance(len(batch))
    model = load()
    with progress("scoring", len(requests), 0) as advance:
        zero, *_ = ends(own[0])
        reference = {each.request.index: each.tokens for each in completions_at[zero]}
        checked = []
        for lam in lambdas:
            completions = completions_at[lam]
            inputs = [tokens[each.request.index] for each in completions], [each.tokens for each in completions]
            own = None if reference_tokens is None else [reference_tokens[each.request.index] for each in completions]
            scored = [each for _, each in score_each(model, *inputs, [zero, lam], reference_prompts=own)]
            count = max(1, sum(len(each.tokens) for each in completions))
            checked.append(
                CheckedLambda(
                    lam,
                    kl_per_token=sum(each.kl[1].sum().item() for each in scored) / count,
                    perplexity=perplexity_of(sum(each.total[0].item() for each in scored), count),
                    repetition=sum(repetition(each.tokens) for each in completions) / len(completions),
                    same=sum(each.tokens == reference[each.request.index] for each in completions) / len(completions),
                )
            )
            advance(len(completions))
    return Check(_mark_fallen_apart(checked), len(prompts), config.max_new_tokens, config.prompts_differ)


def _mark_fallen_apart(checked: Sequence[CheckedLambda]) -> list[CheckedLambda]:
    known = [each for each in checked if is_reference(each.lam) or is_as_trained(each.lam)]
    perplexity, repeated = max(each.perplexity for each in known), max(each.repetition for each in known)
    return [
        replace(
            each,
            falls_apart=each.perplexity > perplexity * PERPLEXITY_FACTOR
            or each.repetition > repeated + ADDED_REPETITION,
        )
        for each in checked
    ]
