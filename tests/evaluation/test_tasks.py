"""Task generators: seeded, within the wanted length, the answer where it is said to be; and the scores of replies."""

import json

import pytest

from jaxtopk.evaluation.tasks import JsonKeyValue, NeedleInHaystack, Sample
from jaxtopk.evaluation.tasks.base import draw_keys, draw_numbers, match_all
from jaxtopk.evaluation.words import ADJECTIVES, NOUNS

TASKS = [
    NeedleInHaystack(),
    NeedleInHaystack(haystack="needles"),
    JsonKeyValue(),
    JsonKeyValue(entries="words"),
]
each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def words(sample: Sample) -> int:
    """A tokenizer of sorts: a token every four characters."""
    return -(-len(sample.text) // 4)


def draw(task, index, *, seed=0, target=800):
    return task.sample(index, seed=seed, target_tokens=target, count_tokens=words)


@each_task
def test_a_sample_fills_its_budget_and_stays_within_it(task):
    lengths = [words(draw(task, index)) for index in range(4)]
    assert max(lengths) <= 800
    assert min(lengths) > 800 - 60  # less than two of the largest pieces is left over


@each_task
def test_the_same_seed_and_index_give_the_same_sample(task):
    assert draw(task, 3) == draw(task, 3)
    assert draw(task, 3).answers != draw(task, 4).answers
    assert draw(task, 3).answers != draw(task, 3, seed=1).answers


@each_task
def test_the_answer_stands_in_the_prompt_at_the_stated_depth(task):
    depths = []
    for index in range(12):
        sample = draw(task, index)
        (answer,) = sample.answers
        assert sample.prompt.count(answer) == 1
        found = sample.prompt.index(answer) / len(sample.prompt)
        assert found == pytest.approx(sample.depth, abs=0.15)
        depths.append(sample.depth)
    assert min(depths) < 0.1
    assert max(depths) > 0.85


@each_task
def test_a_budget_that_one_piece_exceeds_is_refused(task):
    with pytest.raises(ValueError, match=r"target_tokens got 20, wanted at least \d+"):
        draw(task, 0, target=20)


@each_task
def test_the_search_is_bounded_when_length_never_grows(task):
    task_with_a_cap = draw_with_constant_length(task)
    assert task_with_a_cap.num_units >= 1


def draw_with_constant_length(task):
    # Byte counts that ignore the text would let a search without a bound run for ever.
    calls = []

    def count(sample):
        calls.append(sample.num_units)
        assert len(calls) < 64
        return 0 if sample.num_units < 300 else 10**9

    return task.sample(0, seed=0, target_tokens=100, count_tokens=count)


@each_task
def test_a_reply_that_starts_with_the_answer_scores_and_another_does_not(task):
    sample = draw(task, 1)
    assert task.score(sample, f" {sample.answers[0]}.") == 1
    assert task.score(sample, " 0000000.") == 0


def test_the_json_of_the_prompt_parses_and_holds_the_examples_and_the_answer():
    task = JsonKeyValue(entries="words")
    sample = draw(task, 4)
    pairs = json.loads(sample.prompt[sample.prompt.index("{") : sample.prompt.index("}") + 1])
    asked = json.loads("{" + sample.reply_start + '"}')
    assert pairs[next(iter(asked))] == sample.answers[0]
    shown = json.loads(
        "{" + ",".join(sample.prompt[sample.prompt.index("}") :].splitlines()[3:]) + "}"
    )
    assert len(shown) == 2
    assert shown.items() <= pairs.items()
    assert sample.answers[0] not in shown.values()


def test_every_sentence_of_a_multikey_haystack_has_a_key_and_number_of_its_own():
    sample = draw(NeedleInHaystack(haystack="needles"), 5)
    sentences = [line for line in sample.prompt.split(". ") if line.startswith("The code for")]
    assert len(sentences) >= sample.num_units
    assert len({s.split(" is ")[0] for s in sentences}) == len(sentences)


def test_match_all_counts_answers_whatever_case_and_spacing():
    assert match_all(["Red Fox", "7"], "the red  fox saw 7 hens") == 1
    assert match_all(["red fox", "8"], "the red fox saw 7 hens") == 0.5


def test_drawn_keys_and_numbers_are_distinct():
    import numpy as np

    rng = np.random.default_rng(0)
    assert len(set(draw_keys(rng, 5000))) == 5000
    numbers = draw_numbers(rng, 800, 3)
    assert len(set(numbers)) == 800
    assert {len(number) for number in numbers} == {3}
    with pytest.raises(ValueError, match="digits: got 1 for 10 distinct numbers"):
        draw_numbers(rng, 10, 1)
    with pytest.raises(ValueError, match="keys: got"):
        draw_keys(rng, len(ADJECTIVES) * len(NOUNS) + 1)


def test_words_are_plain_and_distinct():
    for words_ in (ADJECTIVES, NOUNS):
        assert len(set(words_)) == len(words_)
        assert all(word.isalpha() and word.islower() for word in words_)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeedleInHaystack(digits=0), "digits: got 0"),
        (lambda: JsonKeyValue(digits=16), "digits: got 16"),
    ],
)
def test_a_bad_task_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
