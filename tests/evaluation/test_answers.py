"""The suites' metrics against values worked out by hand."""

import math

import pytest

from jaxtopk.evaluation import answers
from jaxtopk.evaluation.rouge import rouge_l, rouge_lsum
from jaxtopk.evaluation.stemming import stem


def test_texts_are_compared_without_case_punctuation_articles_and_spaces():
    assert answers.normalise("  The U.S.  of\nAn America! ") == "us of america"
    assert answers.exact_match(["an apple"], "Apple.") == 1
    assert answers.exact_match(["apple"], "apple pie") == 0
    assert (
        answers.exact_match(["pear", "apple pie"], "apple-pie") == 0
    )  # the hyphen goes, no space comes
    assert answers.substring_match(["New York"], "It is in new  york, I think") == 1
    assert answers.substring_match(["York", "Rome"], "Paris") == 0


def test_ruler_counts_what_stands_in_the_reply_letter_by_letter():
    assert answers.contains_share(["Ab", "cd", "ef"], " xAByCDz ") == pytest.approx(2 / 3)
    assert answers.contains_share(["a b"], "a  b") == 0
    assert answers.contains_share(["a b"], "a\tb") == 0  # a tab is not a space
    assert answers.contains_any(["nine", "Ten"], "often") == 1
    assert answers.contains_any(["nine"], "") == 0


def test_token_f1_shares_words_as_often_as_both_have_them():
    # words said: x x y; wanted: x y y. Shared: x y. Precision 2/3, recall 2/3.
    assert answers.token_f1(["x y y"], "x x y") == pytest.approx(2 / 3)
    # Shared: cat. Precision 1/3, recall 1: 2 * 1/3 / (4/3).
    assert answers.token_f1(["dog", "the cat"], "big fat cat") == pytest.approx(0.5)
    assert answers.token_f1(["a"], "") == 0
    assert answers.token_f1(["cat"], "dog") == 0


def test_groups_count_once_whichever_wording_is_met():
    groups = [["Rome", "Roma"], ["Paris"], ["Oslo"]]
    assert answers.group_share(groups, "From Roma (Rome) to paris.") == pytest.approx(2 / 3)
    assert answers.list_recall(groups, "Roma, Rome, Parisian, oslo.") == pytest.approx(2 / 3)
    many = [[str(n)] for n in range(8)]
    assert answers.list_recall(many, "0, 1, 2, 3, 4") == 1  # five are enough
    assert answers.list_recall(many, "0, 1,") == pytest.approx(2 / 5)
    assert answers.list_recall(many, "") == 0


def test_citations_are_dropped():
    assert answers.drop_citations("It is so [1][2].\n\nYes [3] | no[4]") == "It is so. Yes no"


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        (" Paris\nQuestion: next", "Paris"),
        ("I think so.\nanswer: Rome \nMore", "Rome"),
        ("Answer: Answer: Oslo", "Oslo"),
        ("", ""),
    ],
)
def test_the_answer_line_is_the_labelled_one_or_the_first(reply, line):
    assert answers.answer_line(reply) == line


def test_the_better_of_reply_and_answer_line_counts():
    assert answers.best_reading(answers.exact_match, ["rome"], "Well.\nAnswer: Rome") == 1
    assert answers.best_reading(answers.exact_match, ["rome"], "Rome\nor Oslo") == 1
    assert answers.best_reading(answers.substring_match, ["oslo"], "Rome\nor Oslo") == 1


def test_a_ranking_is_the_longest_chain_of_ids():
    assert answers.ranking("ID3 > ID1 > ID3 > 12\nnote 4 > 5") == ["3", "1", "12"]
    assert answers.ranking("[ID: 7] > [ID: 2]") == ["7", "2"]
    assert answers.ranking("none") == []


def test_ndcg_discounts_by_the_logarithm_of_the_rank():
    relevance = {"a": 3, "b": 1, "c": 0, "d": -1}
    best = 3 / math.log2(2) + 1 / math.log2(3)
    assert answers.ndcg(relevance, ["a", "b"]) == pytest.approx(1)
    assert answers.ndcg(relevance, ["c", "b", "x", "a"]) == pytest.approx(
        (1 / math.log2(3) + 3 / math.log2(5)) / best
    )
    assert answers.ndcg(relevance, ["d", "a"], at=1) == 0
    assert answers.ndcg({"a": 0}, ["a"]) == 0


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("The correct answer is (C).", "C"),
        ("**The correct answer is B**", "B"),
        ("The correct answer is B, no: The correct answer is (A)", "A"),  # brackets come first
        ("the correct answer is (C)", None),
        ("C", None),
        ("The correct answer is (E)", None),
    ],
)
def test_a_letter_counts_only_as_stated(reply, letter):
    assert answers.stated_letter(reply) == letter


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("B", 1),
        ("It is C.\nB", 0),  # the first line with a letter
        ("C or B", 1),  # its last letter
        ("Blue whale", 1),  # a first letter counts, whatever follows
        ("Dark whale", 0),
        ("the whale", 1),
        ("answer is: Bee", 1),
        ("so the answer is", 0),
        ("", 0),
        ("dunno", 0),
    ],
)
def test_a_choice_on_a_book_is_read_as_its_repository_reads_it(reply, score):
    assert answers.book_choice("the whale", "B", reply) == score


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("C", 1),
        ("Option C: run", 1),
        ("sort_all is broken", 1),
        ("- sort_all", 0),  # a space is left in front of the name
        ("the fault is: sort_all", 1),
        ("the answer is: other", 0),
        ("D", 0),
        ("", 0),
    ],
)
def test_a_choice_of_a_function_is_read_as_its_repository_reads_it(reply, score):
    assert answers.code_choice("sort_all", "C", reply) == score


def test_numbers_are_read_where_each_task_looks_for_them():
    assert answers.first_digits("01234", "the key 01234, not 99") == 1
    assert answers.first_digits("1234", "01234") == 0
    assert answers.first_digits("1", "none") == 0
    assert answers.holds_word("a-1", 'value: "a-1".') == 1
    assert answers.holds_word("a-1", "a-12") == 0
    assert answers.first_number(7, "about 7.9 or 8") == 1  # the whole part
    assert answers.first_number(7.5, "7.5") == 1
    assert answers.first_number(7.5, "7") == 0
    assert answers.first_number(7, "seven") == 0
    assert answers.first_number(7, "9" * 5000) == 0
    assert answers.last_integer(-3, "f gives `-3`.") == 1
    assert answers.last_integer(3, "3 is it") == 0
    assert answers.last_integer(3, "") == 0
    assert answers.leading_numbers([1, 4, 8, 9], "[1, 4, 7, 9]") == 0.5
    assert answers.leading_numbers([1, 4], "1 then 4 then 5") == 1
    assert answers.leading_numbers([1], "x" + "1" * 5000) == 0


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("caresses", "caress"),
        ("ponies", "poni"),
        ("ties", "tie"),
        ("agreed", "agre"),
        ("feed", "feed"),
        ("plastered", "plaster"),
        ("conflated", "conflat"),
        ("hopping", "hop"),
        ("falling", "fall"),
        ("filing", "file"),
        ("happy", "happi"),
        ("say", "say"),
        ("relational", "relat"),
        ("vietnamization", "vietnam"),
        ("operator", "oper"),
        ("formalize", "formal"),
        ("hopeful", "hope"),
        ("adoption", "adopt"),
        ("controlling", "control"),
        ("generally", "gener"),
        ("geology", "geolog"),
        ("skies", "sky"),
        ("dying", "die"),
        ("us", "us"),
    ],
)
def test_words_are_stemmed_by_porters_rules(word, expected):
    assert stem(word) == expected


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    # the cat sat / cat the sat: two in order of three. Precision 2/3, recall 2/3.
    assert rouge_l(["The cat sat"], "cat the sat!") == pytest.approx(2 / 3)
    # Stems: dog run and a dog run, so 2 of 2 and 2 of 3.
    assert rouge_l(["dogs running"], "a dog runs") == pytest.approx(2 * 2 / 5)
    assert rouge_l(["dogs running"], "dogs runs", stems=True) == pytest.approx(1)
    assert rouge_l(["dogs running"], "dogs runs", stems=False) == pytest.approx(0.5)
    assert rouge_l(["x", "a b"], "a b") == 1
    assert rouge_l(["a"], "") == 0
    words = [f"w{n}" for n in range(300)]
    assert rouge_l([" ".join(words)], " ".join(words[::2])) == pytest.approx(2 * 150 / 450)


def test_rouge_lsum_takes_the_union_over_lines_and_uses_a_word_once():
    # Line 1 of the answer shares "a b" with line 2 and "c" with line 1 of the reply: all three words.
    assert rouge_lsum(["a b c"], "c x\na b") == pytest.approx(2 * 3 / (3 + 4))
    # Both lines of the answer have "a"; the reply has it once.
    assert rouge_lsum(["a\na"], "a") == pytest.approx(2 * 1 / (2 + 1))
    assert rouge_lsum(["cats"], "cat") == 0
    assert rouge_lsum(["catching"], "catches", stems=True) == 1
