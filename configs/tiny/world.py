"""
A small English world: people of six trades make something for somebody, and it goes well or badly.

Everything the tiny recipe needs is made here, from fixed seeds and without any download: the base (a Llama of about
a million parameters, with its tokenizer), the stories that fine-tune it, the prompts, and the reward. A prompt is the
first sentence of a story, and a completion the four or five that follow. Each of them tells of something good or
something bad, so that a story can be anywhere between a triumph and a disaster.
"""

import random
import re
from collections.abc import Iterator

from datasets import Dataset

SEED = 20240205
STORIES = 6000
TRAIN_PROMPTS = 800
HELD_OUT_PROMPTS = 64
VOCABULARY = 1024

NAMES = {
    "she": ["Mara", "Ines", "Tilda", "Ruth", "Nadia", "Elin", "Josie", "Wanda", "Clara", "Petra", "Hanna", "Odile"],
    "he": ["Tomas", "Ivo", "Bruno", "Felix", "Oskar", "Leo", "Hugo", "Amos", "Jonas", "Emil", "Rafe", "Pavel"],
}
THEIR = {"she": "her", "he": "his"}
OPENINGS = [
    "", "", "", "On a windy morning, ", "In the first week of spring, ", "After a long winter, ", "One Sunday, ",
    "In the village of Elmford, ", "By the old harbour, ", "Before sunrise, ", "On market day, ", "Late in autumn, ",
    "While the rain fell, ", "In a town by the sea, ", "At the end of summer, ",
]  # fmt: skip
RECEIVERS = [
    "{their} sister", "{their} brother", "an old friend", "the new teacher", "the mayor", "a hungry traveller",
    "the doctor", "the girl next door", "a lonely neighbour", "the village choir",
]  # fmt: skip
HELPERS = ["the miller", "a young cousin", "the postman", "an aunt", "the fisherman", "a passing soldier", "the smith"]

# What may happen, well (first list) and badly (second list). The starred word is the one that tells which.
HELP = (
    [
        "gave *generous* help", "had *kind* words", "brought soup and was *cheerful*", "knew a trick and was *patient*",
        "lent a hand and was *polite*",
    ],
    [
        "gave *terrible* advice", "had *cruel* words", "stood in the way and was *rude*",
        "let a tool fall and was *careless*", "told lies and was *jealous*",
    ],
)  # fmt: skip
REACTION = (
    [
        "was *delighted*",
        "*smiled* for an hour",
        "was *grateful*",
        "said it was the *finest* gift",
        "laughed with *joy*",
    ],
    ["was *disappointed*", "*frowned* and left", "was *angry*", "said it was the *worst* gift", "cried with *shame*"],
)
EVENING = (
    ["went to bed *happy*", "felt *proud* that night", "walked home *merry*", "slept well and was *content*"],
    [
        "went to bed *miserable*",
        "felt *hopeless* that night",
        "*limped* home in silence",
        "lay awake and was *worried*",
    ],
)
# trade -> goals with the thing that is made, what may happen at work, and to the thing
TRADES = {
    "baker": {
        "goals": {
            "bake a honey cake": "cake", "bake a plum pie": "pie", "bake a round loaf": "loaf",
            "bake a spice bun": "bun",
        },
        "work": (
            ["The dough *rose* high", "The oven was warm and *steady*", "The flour was *fresh* from the mill"],
            ["The dough stayed *flat*", "The oven *smoked* all morning", "Mice had *spoiled* the flour"],
        ),
        "result": (
            ["came out *golden*", "smelled *delicious*", "tasted of summer and was *perfect*"],
            ["came out *burnt*", "fell to the floor and was *ruined*", "tasted *bitter*"],
        ),
    },
    "tailor": {
        "goals": {
            "sew a blue coat": "coat", "sew a silk dress": "dress", "mend a grey cloak": "cloak",
            "stitch a red vest": "vest",
        },
        "work": (
            ["The cloth was *smooth* under the needle", "Every stitch was *neat*", "The measures were *exact*"],
            ["The cloth *tore* at the first cut", "The thread was *tangled* for hours", "The measures were *wrong*"],
        ),
        "result": (
            ["fitted like a glove and looked *splendid*", "looked *elegant* in the sun", "was light and *comfortable*"],
            ["was tight and looked *shabby*", "had no buttons and looked *crooked*", "was full of holes and *useless*"],
        ),
    },
    "gardener": {
        "goals": {
            "grow a giant pumpkin": "pumpkin", "plant a rose bush": "rose bush", "raise an apple tree": "apple tree",
            "grow a tall sunflower": "sunflower",
        },
        "work": (
            ["The soil was dark and *rich*", "Bees came and the days were *sunny*", "The seeds were *healthy*"],
            ["The soil was *poor* and stony", "*Frost* came in the night", "Snails left the seedlings *rotten*"],
        ),
        "result": (
            ["grew high and was *beautiful*", "stood in full bloom and was *magnificent*", "won the first *prize*"],
            ["*withered* in a week", "stayed small and was *ugly*", "*died* before the fair"],
        ),
    },
    "carpenter": {
        "goals": {
            "build an oak table": "table", "carve a small horse": "horse", "build a rocking chair": "chair",
            "make a garden door": "door",
        },
        "work": (
            ["The wood was dry and *sound*", "The saw was sharp and the cuts were *clean*", "The plan was *clever*"],
            ["The wood was *damp*", "The saw slipped and the cuts were *clumsy*", "The plan was *lost*"],
        ),
        "result": (
            ["stood firm and was *sturdy*", "had a polish that was *lovely*", "was finished early and was *flawless*"],
            ["wobbled and was *unsafe*", "split in two and was *broken*", "was finished late and was *dull*"],
        ),
    },
    "musician": {
        "goals": {
            "write a slow waltz": "waltz", "play an old ballad": "ballad", "write a lullaby": "lullaby",
            "practise a hard sonata": "sonata",
        },
        "work": (
            ["The strings were in *tune*", "The melody came and was *charming*", "The hall was *friendly*"],
            ["The strings sounded *harsh*", "The melody was *boring*", "The hall was cold and *noisy*"],
        ),
        "result": (
            ["filled the room and was *wonderful*", "made windows ring and was *glorious*", "ended with *applause*"],
            ["was too long and *dreadful*", "was out of step and was *painful*", "ended with *boos*"],
        ),
    },
    "potter": {
        "goals": {
            "make a deep vase": "vase", "shape a soup bowl": "bowl", "paint a clay jug": "jug",
            "make a little cup": "cup",
        },
        "work": (
            ["The clay was soft and *obedient*", "The wheel turned in a *gentle* rhythm", "The kiln burned *bright*"],
            ["The clay was *dirty*", "The wheel *jammed* again and again", "The kiln went out and was *faulty*"],
        ),
        "result": (
            ["had a glaze that was *brilliant*", "held water and was *useful*", "rang like a bell and was *graceful*"],
            ["had a glaze that was *muddy*", "*leaked* from the start", "had no handle and was *hideous*"],
        ),
    },
}  # fmt: skip

OUTCOMES = [HELP, REACTION, EVENING, *(trade[part] for trade in TRADES.values() for part in ("work", "result"))]
GOOD, BAD = (
    {word.lower() for outcome in OUTCOMES for phrase in outcome[side] for word in re.findall(r"\*(\w+)\*", phrase)}
    for side in (0, 1)
)


def reward(prompts: list, completions: list[str], **columns) -> list[float]:
    """
    How well a story goes: (good - bad) / (good + bad) over the good and the bad things in it, so from -1 to 1.

    A thing is counted by its starred word. A story that tells of neither scores 0.
    """
    scores = []
    for completion in completions:
        words = re.findall(r"[a-z]+", completion.lower())
        good, bad = sum(word in GOOD for word in words), sum(word in BAD for word in words)
        scores.append((good - bad) / max(1, good + bad))
    return scores


def _draw_prompt(rng: random.Random) -> dict:
    pronoun = rng.choice(["she", "he"])
    name, trade = rng.choice(NAMES[pronoun]), rng.choice(list(TRADES))
    goal, thing = rng.choice(list(TRADES[trade]["goals"].items()))
    receiver = rng.choice(RECEIVERS).format(their=THEIR[pronoun])
    opening = rng.choice(OPENINGS)
    text = f"{opening}{name} the {trade} wanted to {goal} for {receiver}."
    return {"text": text, "name": name, "trade": trade, "goal": goal, "thing": thing, "receiver": receiver}


def is_held_out(prompt: dict) -> bool:
    """Whether a prompt is kept from training: an eighth of the pairs of a name and a goal are, in any wording."""
    return random.Random(f"{prompt['name']} {prompt['goal']}").random() < 0.125


def _draw_story(prompt: dict, rng: random.Random) -> str:
    """Four or five sentences; each takes the story's mood three times of four, and the other one else."""
    mood = rng.random() < 0.5

    def pick(choices: tuple[list[str], list[str]]) -> str:
        good = mood if rng.random() < 0.75 else not mood
        return rng.choice(choices[0 if good else 1]).replace("*", "")

    trade = TRADES[prompt["trade"]]
    helper, thing, receiver = rng.choice(HELPERS), prompt["thing"], prompt["receiver"]
    sentences = [
        f"{pick(trade['work'])}.",
        f"{helper[0].upper()}{helper[1:]} {pick(HELP)}.",
        f"The {thing} {pick(trade['result'])}.",
        f"{receiver[0].upper()}{receiver[1:]} {pick(REACTION)}.",
    ]
    if rng.random() < 0.6:
        sentences.append(f"The {prompt['trade']} {pick(EVENING)}.")
    return " " + " ".join(sentences)


def _prompts(held_out: bool, seed: int) -> Iterator[dict]:
    """Endless prompts of one side of the split, none twice."""
    rng, seen = random.Random(seed), set()
    while True:
        prompt = _draw_prompt(rng)
        if is_held_out(prompt) == held_out and prompt["text"] not in seen:
            seen.add(prompt["text"])
            yield prompt


def stories() -> Dataset:
    """What the base is fine-tuned on: rows with a prompt and a completion."""
    rng, source = random.Random(SEED), _prompts(held_out=False, seed=SEED)
    chosen = [next(source) for _ in range(STORIES)]
    return Dataset.from_list([{"prompt": p["text"], "completion": _draw_story(p, rng)} for p in chosen])


def train_prompts() -> Dataset:
    """Prompts that preferences are made from."""
    source = _prompts(held_out=False, seed=SEED + 1)
    return Dataset.from_list([{"prompt": next(source)["text"]} for _ in range(TRAIN_PROMPTS)])


def held_out_prompts() -> Dataset:
    """Prompts that no training has seen, for the sweep; each with its trade, to group them by."""
    source = _prompts(held_out=True, seed=SEED + 2)
    chosen = [next(source) for _ in range(HELD_OUT_PROMPTS)]
    return Dataset.from_list([{"prompt": p["text"], "trade": p["trade"]} for p in chosen])


def model():
    """A new Llama of about a million parameters, and a tokenizer trained on the stories: (model, tokenizer)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((row["prompt"] + row["completion"] for row in stories()), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )
    set_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config), tokenizer
