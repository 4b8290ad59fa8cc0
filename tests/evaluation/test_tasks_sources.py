"""What tasks are made of: haystacks, words, files of questions, names; and what bad input says."""

import json
import re

import numpy as np
import pytest

from jaxtopk.data.corpora import Document
from jaxtopk.evaluation.tasks import (
    Haystack,
    JsonKeyValue,
    NeedleInHaystack,
    Sample,
    TokenSample,
    expand_names,
    haystack,
    make_task,
    task_names,
)
from jaxtopk.evaluation.tasks.associative_recall import AssociativeRecall
from jaxtopk.evaluation.tasks.drawing import (
    draw_keys,
    draw_letters,
    draw_numbers,
    draw_words,
    generator,
    grid_depth,
)
from jaxtopk.evaluation.tasks.fitting import fit_budget, fit_whole_units
from jaxtopk.evaluation.tasks.haystack import filler_words, insert
from jaxtopk.evaluation.tasks.math_calc import MathCalc
from jaxtopk.evaluation.tasks.passkey import PassKey
from jaxtopk.evaluation.tasks.question_file import read_entries
from jaxtopk.evaluation.tasks.variable_tracking import VariableTracking
from jaxtopk.evaluation.words import ADJECTIVES, NOUNS, OTHERS

TEXT = " ".join(f'Sentence {i} ends here! "Is it {i}?" she asked.\nNo.' for i in range(40))


def count(sample: Sample) -> int:
    return len(re.findall(r"[A-Za-z]{1,5}|[0-9]|[^\w\s]", sample.text))


def test_a_text_is_cut_at_the_ends_of_its_sentences():
    pieces = Haystack.from_text(TEXT, name="story").pieces
    assert pieces[:4] == ("Sentence 0 ends here! ", '"Is it 0?" ', "she asked. ", "No. ")
    assert "".join(pieces).split() == TEXT.split()
    long = Haystack.from_text("word " * 350, name="no stops").pieces
    assert [len(piece.split()) for piece in long] == [100, 100, 100, 50]


def test_a_haystack_starts_at_a_drawn_piece_and_comes_round():
    source = Haystack(name="three", pieces=("a. ", "b. ", "c. "))
    drawn = {tuple(source.draw(np.random.default_rng(i), 4)) for i in range(20)}
    assert drawn == {
        ("a. ", "b. ", "c. ", "a. "),
        ("b. ", "c. ", "a. ", "b. "),
        ("c. ", "a. ", "b. ", "c. "),
    }
    assert source.draw(np.random.default_rng(0), 1, "end.")[1:] == ["end. "]


def test_texts_are_inserted_at_the_nearest_place_and_keep_their_order():
    pieces = ["1234 ", "1 ", "123456 "]  # ends at 5, 7, 14
    at = lambda *depths: insert(pieces, [(depth, f"<{i}>") for i, depth in enumerate(depths)])
    assert at(0.0) == ["<0>", *pieces]
    assert at(1.0) == [*pieces, "<0>"]
    assert at(0.4) == ["1234 ", "<0>", "1 ", "123456 "]
    assert at(0.1, 0.0) == ["<0>", "<1>", *pieces]


def test_a_haystack_has_a_name_or_is_a_file(tmp_path, monkeypatch):
    path = tmp_path / "story.txt"
    path.write_text(TEXT)
    assert Haystack.named("noise") == Haystack.noise()
    assert Haystack.named(path) == Haystack.from_text(TEXT, name="story.txt")
    monkeypatch.setattr(haystack, "shakespeare_plays", lambda: (Document("T", TEXT),) * 2)
    haystack._plays.cache_clear()
    try:
        assert Haystack.named("shakespeare").pieces == Haystack.named(path).pieces * 2
    finally:
        haystack._plays.cache_clear()
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(
        ValueError, match=r"haystack: got 2 words in short.txt, wanted at least 100"
    ):
        Haystack.named(tmp_path / "short.txt")
    for name in ("latin.txt", "missing.txt"):
        with pytest.raises(ValueError, match="wanted noise, shakespeare or a UTF-8 text file"):
            Haystack.named(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["niah", "niah_single_2", "niah_single_3", "niah_multikey_1", "vt", "passkey"]
)
def test_a_given_haystack_is_the_one_that_is_used_and_needles_stand_between_sentences(name):
    task = make_task(name, haystack=Haystack.from_text(TEXT, name="story"))
    sample = task.sample(6, seed=0, target_tokens=1400, count_tokens=count)
    assert "Sentence 30 ends here!" in sample.prompt
    assert count(sample) + task.reply_tokens >= 0.99 * 1400
    for needle in re.finditer(
        r"(.)\s(The code for \S+ is|Set [A-Z]{5} to|The pass key is \d)", sample.prompt
    ):
        assert needle.group(1) in '.!?"\n'
    plain = make_task("niah_single_1", haystack=Haystack.from_text(TEXT, name="story"))
    assert "ends here" not in plain.sample(0, seed=0, target_tokens=300, count_tokens=count).prompt


def test_filler_words_are_as_many_as_asked_and_end_in_a_stop():
    assert filler_words(0) == ""
    for number in range(1, 40):
        assert len(filler_words(number).split()) == number
        assert filler_words(number).endswith(".")


def test_a_search_finds_what_fits_with_few_long_counts():
    for unit, per_word, budget in (
        (33, 1.3, 4000),
        (75, 4.7, 128000),
        (1, 1.0, 5000),
        (900, 1.1, 3000),
    ):
        calls = []

        def length(units, words, unit=unit, per_word=per_word, calls=calls):
            calls.append(units)
            return 50 + unit * units + int(per_word * words)

        units, words = fit_budget(length, budget)
        assert 0.99 * budget <= length(units, words) <= budget
        assert words * per_word <= unit + budget / 200
        assert len(calls) < 20
    # Length that is no straight line, as where words are drawn anew for each size.
    rough = lambda units, words: int(40 + units**1.2 + 25 * (units * 7919 % 3) + words)
    assert 0.99 * 9000 <= rough(*fit_budget(rough, 9000)) <= 9000
    assert fit_whole_units(lambda units: 10 * units + 3, 1000) == 99


def test_streams_of_samples_differ_by_seed_index_and_split():
    draws = {
        generator(seed, index, split, task=task).bytes(8)
        for seed in (0, 1, 2)
        for index in (0, 1, 2)
        for split in ("test", "train")
        for task in ("", "niah", "vt")
    }
    assert len(draws) == 54
    assert [round(39 * grid_depth(i)) for i in (0, 1, 2, 40)] == [0, 17, 34, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: generator(-1, 0), "seed: got -1, wanted 0 to"),
        (lambda: generator(0, 2**32), "index: got 4294967296"),
        (lambda: generator(0, 0, "dev"), "split: got 'dev', wanted one of test, train"),
        (lambda: draw_numbers(generator(0, 0), 10, 1), "digits: got 1 for 10 distinct numbers"),
        (lambda: draw_letters(generator(0, 0), 400, 2), "letters: got 2 for 400 distinct words"),
        (lambda: draw_keys(generator(0, 0), len(ADJECTIVES) * len(NOUNS) + 1), "keys: got"),
        (lambda: NeedleInHaystack(digits=0), "digits: got 0"),
        (lambda: NeedleInHaystack(depth=1.5), "depth: got 1.5, wanted 0 to 1"),
        (lambda: NeedleInHaystack(queries=2, depth=0.5), "depth: got 0.5 with several needles"),
        (lambda: NeedleInHaystack(haystack="needles", distractors=3), "distractors: got 3 among"),
        (lambda: NeedleInHaystack(values_per_key=0), "values_per_key: got 0, wanted at least 1"),
        (lambda: JsonKeyValue(digits=16), "digits: got 16"),
        (lambda: PassKey(depth=-0.1), "depth: got -0.1"),
        (lambda: VariableTracking(hops=0), "hops: got 0"),
        (lambda: MathCalc(results=1), "results: got 1"),
        (lambda: AssociativeRecall(pairs=0), "pairs: got 0"),
        (lambda: AssociativeRecall(power=0.0), "power: got 0.0"),
        (
            lambda: AssociativeRecall(pairs=9).sample(0, seed=0, target_tokens=35, vocab_size=99),
            "mqar: target_tokens got 35, wanted at least 36 for 9 pairs",
        ),
        (
            lambda: AssociativeRecall().sample(0, seed=0, target_tokens=100, vocab_size=100),
            "mqar: target_tokens got 100, wanted fewer than the 100 tokens",
        ),
        (lambda: _sample(()), r"answers: got \(\), wanted strings"),
        (lambda: _sample(("x", " ")), r"answers: got \('x', ' '\), wanted strings that are not empty"),
        (lambda: TokenSample(tokens=(1, 2), labels=(1,)), "labels: got 1, wanted 2"),
        (lambda: TokenSample(tokens=(1, 2), labels=(-1, -1)), "labels: got none"),
        (lambda: make_task("niah_singel_1"), "task: got 'niah_singel_1', wanted one of niah_single_1"),
        (lambda: expand_names(["rular"]), "task: got 'rular', wanted one of ruler"),
        (lambda: task_names("longbench"), "suite: got 'longbench', wanted one of ruler"),
        (lambda: make_task("qa_1"), "qa: got None, wanted a file of questions for qa_1"),
        (lambda: make_task("qa_2", qa="nowhere.jsonl"), "qa: got 'nowhere.jsonl'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)


def _sample(answers):
    return Sample(prompt="p", reply_start="r", answers=answers, depth=None, num_units=1)


def test_suites_are_expanded_in_order_and_each_task_once():
    assert len(task_names("ruler")) == 13
    assert expand_names(["vt", "ruler", "mqar"])[0] == "vt"
    assert len(expand_names(["vt", "ruler", "mqar"])) == 14
    assert expand_names(["all"]) == task_names()
    assert set(task_names("infinitebench")) < set(task_names())


def test_words_are_plain_and_distinct():
    for words in (ADJECTIVES, NOUNS, OTHERS):
        assert len(set(words)) == len(words)
        assert all(word.isalpha() and word.islower() for word in words)
    assert not set(OTHERS) & {*ADJECTIVES, *NOUNS}
    rng = np.random.default_rng(0)
    assert len(set(draw_keys(rng, 5000))) == 5000
    assert len(set(draw_words(rng, 5000))) == 5000
    assert not any("-" in word for word in draw_words(rng, 500))
    numbers = draw_numbers(rng, 800, 3)
    assert len(set(numbers)) == 800
    assert {len(number) for number in numbers} == {3}


HOTPOT = {
    "question": "Who built it?",
    "answer": "Ann",
    "context": [["Mill", ["It is old. ", "Ann built it."]], ["Ann", ["She was a smith."]]],
}
SQUAD = {"question": "Where?", "answers": ["Rome", "the city"], "context": "He lives in Rome."}


def _write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_questions_are_read_in_both_forms(tmp_path):
    columns = {
        **HOTPOT,
        "context": {"title": ["Mill", "Ann"], "sentences": [s for _, s in HOTPOT["context"]]},
    }
    path = _write(tmp_path / "q.jsonl", SQUAD, "", HOTPOT, columns)
    squad, hotpot, same = read_entries(str(path))
    assert squad.answers == ("Rome", "the city")
    assert squad.paragraphs == ("He lives in Rome.",)
    assert hotpot == same
    assert hotpot.paragraphs == ("Mill. It is old. Ann built it.", "Ann. She was a smith.")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "got Expecting"),
        ({"question": "Who?", "context": "x"}, "got no 'answer'"),
        ({**SQUAD, "answers": []}, "an empty question, answer or context"),
        ({**SQUAD, "answers": [" "]}, "an empty question, answer or context"),
        ({**SQUAD, "context": 3}, "line 2: got"),
        ("[1]", "line 2: got"),
    ],
)
def test_a_bad_line_of_questions_is_named(tmp_path, line, reason):
    path = _write(tmp_path / "q.jsonl", SQUAD, line, HOTPOT)
    with pytest.raises(ValueError, match=r"q.jsonl line 2: got") as refused:
        make_task("qa_1", qa=path)
    assert reason in str(refused.value)
    with pytest.raises(ValueError, match="got 1 questions, wanted at least 2"):
        read_entries(str(_write(tmp_path / "one.jsonl", SQUAD)))


def test_the_paragraphs_of_a_question_stand_among_those_of_others(tmp_path):
    others = [{**SQUAD, "context": f"Person {i} lives in town {i}."} for i in range(5)]
    _write(tmp_path / "hotpotqa.jsonl", HOTPOT, *others)
    _write(tmp_path / "squad.jsonl", SQUAD, *others)
    task = make_task("qa_2", qa=tmp_path)
    sample = task.sample(0, seed=0, target_tokens=400, count_tokens=count)
    documents = re.findall(r"Document (\d+): (.*)", sample.prompt)
    assert [int(number) for number, _ in documents] == list(range(1, sample.num_units + 3))
    for paragraph in read_entries(str(tmp_path / "hotpotqa.jsonl"))[0].paragraphs:
        assert [text for _, text in documents].count(paragraph) == 1
    assert sample.depth is None
    assert task.score(sample, " It was ann, I think.") == 1
    squad = make_task("qa_1", qa=tmp_path)
    sample = squad.sample(0, seed=0, target_tokens=400, count_tokens=count)
    assert sample.depth == sample.prompt.index("Rome") / len(sample.prompt)
    with pytest.raises(ValueError, match="qa_2: index got 6, wanted less than 6"):
        task.sample(6, seed=0, target_tokens=400, count_tokens=count)
