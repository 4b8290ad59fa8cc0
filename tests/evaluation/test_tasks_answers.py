"""The answers of tasks, worked out again from nothing but the text of the prompt; and scores of part-right replies."""

import collections
import hashlib
import json
import re

import numpy as np
import pytest

from jaxtopk.evaluation.tasks import TokenSample, make_task
from jaxtopk.evaluation.tasks.integers import integers


def draw(name, index, *, target=1200, seed=3):
    length = lambda sample: len(re.findall(r"[A-Za-z]{1,5}|[0-9]|[^\w\s]", sample.text))
    return make_task(name).sample(index, seed=seed, target_tokens=target, count_tokens=length)


@pytest.mark.parametrize(("target", "common", "others"), [(1200, 6, 1), (4400, 30, 3)])
def test_common_words_come_up_as_often_as_stated(target, common, others):
    for index in range(3):
        sample = draw("cwe", index, target=target)
        example, asked = sample.prompt.split("List: ")[1:]
        entries = re.findall(r"(\d+)\. (\S+)", asked)
        assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
        counts = collections.Counter(word for _, word in entries)
        assert {word for word, times in counts.items() if times == common} == set(sample.answers)
        assert set(counts.values()) == {common, others}
        assert len(counts) == sample.num_units + 10
        shown = collections.Counter(word for _, word in re.findall(r"(\d+)\. (\S+)", example))
        stated = re.search(r"The ten words are (.*)\.", example).group(1).split(", ")
        assert {word for word, _ in shown.most_common(10)} == set(stated)
        assert not shown.keys() & counts.keys()


def test_frequent_words_follow_their_law():
    for index in range(3):
        sample = draw("fwe", index)
        text = sample.prompt.split("\n\n")[-2].split()
        ranked = collections.Counter(text).most_common()
        assert ranked[0][0] == "..."
        assert {word for word, _ in ranked[1:4]} == set(sample.answers)
        assert ranked[3][1] > ranked[4][1]  # the fifth is no answer, so it must be rarer
        total = sample.num_units + 99
        assert [times for _, times in ranked[:5]] == [
            int(total * 6 / (np.pi * rank) ** 2) for rank in range(1, 6)
        ]


@pytest.mark.parametrize("index", range(14))
def test_the_number_found_is_the_one_asked_for(index):
    sample = draw("math_find", index, target=400)
    numbers = sorted(int(n) for n in sample.prompt.split("\n\n")[-2].split(", "))
    distinct = sorted(set(numbers))
    assert len(numbers) % 2 == 1
    assert 0 <= numbers[0] < 20
    assert 79 < numbers[-1] < 100
    asked = re.search(r"What is the (.*) number in", sample.prompt).group(1)
    wanted = {
        "largest": distinct[-1],
        "second largest": distinct[-2],
        "third largest": distinct[-3],
        "smallest": distinct[0],
        "second smallest": distinct[1],
        "third smallest": distinct[2],
        "median": numbers[len(numbers) // 2],
    }
    assert sample.answers == (str(wanted[asked]),)
    assert dict(sample.meta) == {"question": asked}
    assert make_task("math_find").score(sample, f" {wanted[asked]}, not {wanted[asked] + 1}") == 1
    assert make_task("math_find").score(sample, f" {wanted[asked] + 1} or {wanted[asked]}") == 0


def test_running_results_follow_the_expression():
    for index in range(4):
        sample = draw("math_calc", index, target=900)
        expression = sample.prompt.split("Expression: ")[-1].split("\n")[0].split()
        total, totals = int(expression[0]), [int(expression[0])]
        for sign, value in zip(expression[1::2], expression[2::2], strict=True):
            total += {"+": 1, "-": -1}[sign] * int(value)
            totals.append(total)
        assert all(0 <= t < 100 for t in totals)
        assert sample.answers == tuple(map(str, totals[:20]))


def test_a_chain_of_results_scores_up_to_its_first_error():
    task, sample = make_task("math_calc"), draw("math_calc", 0, target=900)
    right = list(sample.answers)
    assert task.score(sample, ", ".join(right[:5])) == 5 / 20
    assert task.score(sample, ", ".join([*right[:5], "1000", *right[6:]])) == 5 / 20
    assert task.score(sample, ", ".join([*right, "7"])) == 1


@pytest.mark.parametrize("index", range(9))
def test_code_returns_what_a_reading_of_it_gives(index):
    sample = draw("code_run", index)
    functions = dict(re.findall(r"def (\w+)\(x\):\n    return (.*)\n", sample.prompt + "\n"))
    assert len(functions) == sample.num_units + index + 2
    name, argument = re.search(r"does (\w+)\((\d+)\) return", sample.prompt).groups()
    value, calls = int(argument), 0
    while name:
        calls += 1
        body = re.fullmatch(r"(?:(\w+)\(x\)|x) ([+-]) (\d+)", functions[name])
        name, sign, constant = body.groups()
        value += int(sign + constant)
    assert sample.answers == (str(value),)
    assert calls == index + 2
    assert dict(sample.meta) == {"calls": str(calls)}
    assert all(other in functions for other in re.findall(r"return (\w+)\(", sample.prompt))


def test_variables_are_a_chain_in_order():
    for index in range(3):
        sample = draw("vt", index)
        example, text = sample.prompt.split("Text: ")[1:]
        for part, letters in ((example, 3), (text, 5)):
            number = re.search(r"hold the number (\d{5})\?", part).group(1)
            held: dict[str, str] = {}
            for name, source in re.findall(r"Set ([A-Z]+) to (?:the value of )?(\w+)\.", part):
                held[name] = held.get(source, source)  # a name not set yet would stay a name
            assert set(held.values()) == {number}
            assert [len(name) for name in held] == [letters] * 5
            stated = re.search(rf"hold {number} are (.*)\.", part)
            assert tuple(held) == (tuple(stated.group(1).split(", ")) if stated else sample.answers)
        assert make_task("vt").score(sample, sample.answers[0]) == 0.2


def test_needles_that_are_not_asked_for_have_other_keys():
    sample = draw("niah_multikey_1", 1)
    pairs = dict(re.findall(r"The code for (\S+) is (\d{7})\.", sample.prompt))
    asked = re.search(r"What is the code for (\S+)\?", sample.prompt).group(1)
    assert len(pairs) == 4
    assert pairs[asked] == sample.answers[0]


def test_all_values_of_a_key_and_of_several_keys_are_asked_for():
    sample = draw("niah_multivalue", 1)
    pairs = re.findall(r"The code for (\S+) is (\d{7})\.", sample.prompt)
    assert len({key for key, _ in pairs}) == 1
    assert sorted(value for _, value in pairs) == sorted(sample.answers)
    assert sample.depth is None
    sample = draw("niah_multiquery", 1)
    pairs = dict(re.findall(r"The code for (\S+) is (\d{7})\.", sample.prompt))
    asked = re.search(r"all the codes for (.*)\?", sample.prompt).group(1).replace(" and ", ", ")
    assert [pairs[key] for key in asked.split(", ")] == list(sample.answers)


def test_every_sentence_of_a_haystack_of_needles_has_a_key_and_value_of_its_own():
    for name, key in (("niah_multikey_2", r"[a-z]+-[a-z]+"), ("niah_multikey_3", r"[0-9a-f-]{36}")):
        sample = draw(name, 5)
        pairs = re.findall(rf"The code for ({key}) is (\S+)\. ?", sample.prompt)
        assert len(pairs) == sample.num_units + 1
        assert len(dict(pairs)) == len({value for _, value in pairs}) == len(pairs)


def test_the_json_of_the_prompt_holds_the_examples_and_the_answer():
    for name in ("json_kv", "json_kv_words", "kv_retrieval"):
        sample = draw(name, 4)
        start, end = sample.prompt.index("{"), sample.prompt.index("}") + 1
        pairs = json.loads(sample.prompt[start:end])
        asked = next(iter(json.loads("{" + sample.reply_start + '"}')))
        assert pairs[asked] == sample.answers[0]
        if name == "kv_retrieval":
            assert asked in sample.prompt[end:]
        else:
            shown = json.loads("{" + ",".join(sample.prompt[end:].splitlines()[3:]) + "}")
            assert len(shown) == 2
            assert shown.items() <= pairs.items()
            assert sample.answers[0] not in shown.values()


def test_digits_are_five_or_five_doubled_and_have_to_be_exact():
    for index in range(6):
        sample = draw("passkey", index)
        assert re.fullmatch(r"[0-9]{5}", sample.answers[0])
        string = draw("number_string", index).answers[0]
        assert re.fullmatch(r"[0-9]{10}", string)
        assert len(re.sub(r"(.)\1*", r"\1", string)) <= 5  # doubling adds no run
    task = make_task("passkey")
    (answer,) = sample.answers
    assert task.score(sample, f": {answer}. {answer}1") == 1
    assert task.score(sample, f" {answer}1") == 0
    assert task.score(sample, f" {answer[1:]}") == 0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("is 12, 34.", [12, 34]),
        ("1,234,567 or -5", [1234567, -5]),
        ("3-4 func_7 \u22128", [3, 4, -8]),
        ("1,23", [1, 23]),
        ("007", [7]),
        ("none", []),
    ],
)
def test_integers_are_read_as_people_write_them(text, found):
    assert integers(text) == found


def test_recall_of_tokens_is_laid_out_as_stated():
    length, vocab = 512, 2000
    for index in range(3):
        sample = make_task("mqar").sample(index, seed=0, target_tokens=length + 1, vocab_size=vocab)
        tokens, labels = np.array(sample.tokens), np.array(sample.labels)
        pairs = 32
        assert len(tokens) == len(labels) == length
        keys, values = tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert keys.min() >= 1
        assert keys.max() < vocab // 2 <= values.min()
        assert values.max() < vocab
        places = np.flatnonzero(labels >= 0)
        assert len(places) == pairs
        assert set(places % 2) == {0}
        assert places.min() == sample.first_label >= 2 * pairs
        held = dict(zip(keys, values, strict=True))
        assert [held[tokens[place]] for place in places] == labels[places].tolist()
        # A key stands in its pair and at its question only.
        assert np.isin(tokens, keys).sum() == 2 * pairs


def test_returning_keys_are_dense_near_the_pairs():
    places = np.concatenate(
        [
            np.flatnonzero(np.array(s.labels) >= 0)
            for s in (
                make_task("mqar").sample(i, seed=1, target_tokens=1024, vocab_size=4000)
                for i in range(8)
            )
        ]
    )
    # 64 pairs; by weights of 1 / g on 448 slots, most of the questions are in the first half.
    assert np.mean(places < 128 + 448) > 0.7
    assert places.max() > 900


def test_token_accuracy_is_the_share_of_labels_met():
    task = make_task("mqar")
    sample = TokenSample(tokens=(5, 6, 7, 8), labels=(-1, 3, -1, 4))
    assert sample.first_label == 1
    assert task.score(sample, (0, 3, 0, 4)) == 1
    assert task.score(sample, (0, 3, 4, 0)) == 0.5
    assert task.score(sample, (-1, -1, -1, -1)) == 0
    with pytest.raises(ValueError, match="predictions: got 1, wanted 4"):
        task.score(sample, (3,))


def test_recall_of_tokens_is_seeded_and_split():
    task = make_task("mqar")
    draw = lambda **settings: task.sample(
        **{"index": 0, "seed": 0, "target_tokens": 128, "vocab_size": 500} | settings
    )
    assert draw() == draw()
    assert (
        len({draw().tokens, draw(seed=1).tokens, draw(index=1).tokens, draw(split="train").tokens})
        == 4
    )
    assert hashlib.sha256(str(draw()).encode()).hexdigest()[:12] == "faa2b43cbf3b"
