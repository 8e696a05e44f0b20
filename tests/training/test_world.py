"""The tiny recipe's world: its texts, its split, its reward and its tokenizer."""

import re
import sys

import pytest

from dera_peft.user_code import load_object


@pytest.fixture(scope="module")
def world():
    return sys.modules[load_object("configs/tiny/world.py:reward").__module__]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def test_every_phrase_tells_of_one_thing(world):
    assert not world.GOOD & world.BAD
    for outcome in world.OUTCOMES:
        for side, (own, other) in enumerate([(world.GOOD, world.BAD), (world.BAD, world.GOOD)]):
            for phrase in outcome[side]:
                found = words(phrase)
                assert (sum(w in own for w in found), sum(w in other for w in found)) == (1, 0), phrase


@pytest.mark.parametrize(
    ("story", "expected"),
    [
        (" The dough rose high. The miller had kind words. The pie came out golden. The mayor laughed with joy.", 1.0),
        (" The dough stayed flat. The miller had cruel words. The pie came out burnt. The mayor was angry.", -1.0),
        (" The dough rose high. The miller had kind words. The pie came out burnt. The mayor laughed with joy.", 0.5),
        (" The dough rose high. The mayor was angry.", 0.0),
        (" Nothing happened.", 0.0),
        ("", 0.0),
    ],
)
def test_the_reward_on_stories_counted_by_hand(world, story, expected):
    assert world.reward(["A prompt."], [story]) == [expected]


def test_the_stories_are_many_and_the_held_out_prompts_unseen(world):
    stories = world.stories()
    assert len(stories) == world.STORIES
    assert len(set(stories["completion"])) > 5000
    rewards = world.reward(stories["prompt"], stories["completion"])
    assert abs(sum(rewards) / len(rewards)) < 0.05, "good and bad are even"
    held_out = world.held_out_prompts()["prompt"]
    assert len(set(held_out)) == 64
    trained = set(stories["prompt"]) | set(world.train_prompts()["prompt"])
    assert not set(held_out) & trained
    # held out is a person with a goal, in any wording: nothing of the kind was in training
    pair = re.compile(r"(\w+) the \w+ wanted to (.+?) for ")
    seen = {pair.search(prompt).groups() for prompt in trained}
    assert not {pair.search(prompt).groups() for prompt in held_out} & seen


def test_it_is_the_same_every_time(world):
    assert world.stories()[:20] == world.stories()[:20]


def test_the_base_is_small_and_its_tokenizer_loses_nothing(world):
    model, tokenizer = world.model()
    assert 0.8e6 < model.num_parameters() < 1.2e6
    config = model.config
    sizes = [
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        *model.model.layers[0].self_attn.k_proj.weight.shape,
    ]
    assert all(size % 64 == 0 for size in sizes)
    assert len(tokenizer) <= config.vocab_size
    for row in world.stories().select(range(50)):
        text = row["prompt"] + row["completion"]
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        prompt = tokenizer(row["prompt"])["input_ids"]
        assert ids[: len(prompt)] == prompt, "a completion's tokens do not depend on how the prompt was cut off"
