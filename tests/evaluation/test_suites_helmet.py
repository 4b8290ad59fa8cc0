"""The reader of HELMET on small hand-made folders: fields, draws, prompts and scores of every sub-task."""

import json
import math

import pytest

from jaxtopk.evaluation.suites import not_run, open_suite
from jaxtopk.evaluation.suites.helmet_base import pick_examples, shuffled


def words(sample):
    """A tokenizer of sorts: a token every four characters."""
    return -(-len(sample.text) // 4)


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def opened(folder, name, **options):
    (task,) = open_suite("helmet", folder, subtasks=[name], **options)
    assert task.name == f"helmet.{name}"
    return task


def draw(task, index=0, target=8192):
    return task.sample(index, seed=0, target_tokens=target, count_tokens=words)


def test_helmet_opens_what_is_there_from_its_root_or_its_data(tmp_path):
    write(tmp_path / "data/json_kv/test_k105_dep6.jsonl", json_kv_row())
    for folder in (tmp_path, tmp_path / "data"):
        assert [task.name for task in open_suite("helmet", folder)] == ["helmet.json_kv"]


def test_parts_that_need_other_models_are_listed_with_the_reason():
    reasons = not_run("helmet")
    assert set(reasons) == {
        "narrativeqa",
        "infbench_sum",
        "multi_lexsum",
        "alce_asqa_citations",
        "alce_qampari_citations",
    }
    assert all("needs a" in reason for reason in reasons.values())


# ------------------------------------------------------------------------------------------------------------ recall
def json_kv_row(**changed):
    pairs = {f"k{n}": f"v-{n}" for n in range(4)}
    return {
        "context": json.dumps(pairs),
        "question": "k2",
        "answer": "v-2",
        "demos": [["k0", "v-0"], ["k3", "v-3"], ["k1", "v-1"]],
        "num_kvs": 4,
        **changed,
    }


def test_json_kv_shows_two_look_ups_and_scores_the_value(tmp_path):
    write(tmp_path / "json_kv/test_k105_dep6.jsonl", json_kv_row())
    task = opened(tmp_path, "json_kv")
    assert (task.size, task.reply_tokens, task.stop, task.wording) == (1, 100, (), "own")
    sample = draw(task)
    assert sample.text.endswith("Key: k3\nValue: v-3\n\nKey: k2\nValue:")
    assert sample.prompt.count("v-1") == 1  # two examples, no more
    assert sample.depth == sample.prompt.index("v-2") / len(sample.prompt)
    assert dict(sample.meta) == {"category": "Recall"}
    assert task.score(sample, " V2, of course") == 1  # hyphens do not count
    assert task.score(sample, " v-1") == 0
    assert draw(opened(tmp_path, "json_kv", model_chat=True)).text == sample.prompt


def test_the_file_is_the_one_for_the_largest_length_within_the_target(tmp_path):
    for pairs in (105, 440):  # 8k and 32k
        context = json.dumps({"of": pairs}) + " " * 20_000
        write(tmp_path / f"json_kv/test_k{pairs}_dep6.jsonl", json_kv_row(context=context))
    task = opened(tmp_path, "json_kv")
    for target, pairs in ((8192, 105), (32_767, 105), (32_768, 440), (10**6, 440), (2000, 105)):
        assert f'{{"of": {pairs}}}' in draw(task, target=target).prompt
    # Below the smallest file its context loses the end, never what is asked.
    sample = draw(task, target=2000)
    assert 0.99 * 1900 <= words(sample) <= 1900
    assert sample.text.endswith("Key: k2\nValue:")
    assert int(dict(sample.meta)["characters_cut"]) > 12_000


def test_a_shorter_file_of_another_length_is_named(tmp_path):
    write(tmp_path / "json_kv/test_k105_dep6.jsonl", json_kv_row(), json_kv_row())
    write(tmp_path / "json_kv/test_k440_dep6.jsonl", json_kv_row())
    with pytest.raises(ValueError, match=r"test_k440_dep6.jsonl: got 1 samples, wanted 2"):
        draw(opened(tmp_path, "json_kv"), 1, target=40_000)


def test_a_hundred_are_drawn_in_the_order_of_seed_42(tmp_path):
    rows = [json_kv_row(question=f"q{n}") for n in range(150)]
    write(tmp_path / "json_kv/test_k105_dep6.jsonl", *rows)
    task = opened(tmp_path, "json_kv")
    assert task.size == 100
    asked = [draw(task, index).prompt.rsplit("q", 1)[1] for index in range(100)]
    assert list(map(int, asked)) == shuffled(150, 42)[:100]
    assert sorted(shuffled(150, 42)) == list(range(150))


def test_the_four_tasks_of_ruler_ask_for_what_their_files_say(tmp_path):
    row = {"context": "numbers for fox: 11, 22.", "query": "fox", "type_needle_v": "numbers"}
    for folder in ("niah_multikey_2", "niah_multivalue"):
        file = tmp_path / f"ruler/{folder}/validation_8192.jsonl"
        write(file, row | {"answer": ["11", "22"]})
    task = opened(tmp_path, "ruler_niah_mv")
    sample = draw(task)
    assert "magic numbers" in sample.prompt
    assert "for fox?" in sample.prompt
    assert (task.reply_tokens, task.metric) == (50, "ruler_recall")
    assert task.score(sample, "22") == 0.5
    assert sample.depth == sample.prompt.index("11") / len(sample.prompt)
    assert "Name all" in sample.prompt
    assert "Name all" not in draw(opened(tmp_path, "ruler_niah_mk_2")).prompt

    row = {"context": "1. a 2. b", "example": "As here: 1. x", "outputs": ["a", "b"]}
    write(tmp_path / "ruler/cwe/validation_8192.jsonl", row)
    task = opened(tmp_path, "ruler_cwe")
    sample = draw(task)
    assert task.aggregation
    assert sample.prompt.startswith("As here: 1. x\n\n1. a 2. b")
    assert task.score(sample, "B") == 0.5
    assert sample.depth is None


# --------------------------------------------------------------------------------------------------------- documents
def kilt_row(name, *, depth=0, **changed):
    return {
        "question": f"Who is {name}?",
        "answers": [f"{name} I", f"the {name}"],
        "ctxs": [{"title": f"On {name}", "text": f"{name} at {depth}."}],
        **changed,
    }


def test_kilt_asks_each_drawn_question_at_all_its_depths_after_two_other_questions(tmp_path):
    names = [f"N{n:03}" for n in range(120)]
    rows = [kilt_row(name, depth=depth) for name in names for depth in range(2)]
    write(tmp_path / "kilt/nq-dev-multikilt_1000_k50_dep6.jsonl", *rows)
    shots = [kilt_row(name) for name in ("Anna", "Anna", "Bert", "Carl")]
    write(tmp_path / "kilt/nq-train-multikilt_1000_k3_dep6.jsonl", *shots)
    task = opened(tmp_path, "nq")
    assert (task.size, task.stop, task.reply_tokens) == (200, ("\n",), 20)  # 100 questions
    first, second = draw(task, 0), draw(task, 1)
    assert first.answers == second.answers
    assert first.prompt.replace(" at 0.", "") == second.prompt.replace(" at 1.", "").replace(
        " at 0.", ""
    )
    shown = [name for name in ("Anna", "Bert", "Carl") if f"Answer: {name} I\n" in first.prompt]
    assert len(shown) == 2  # of different questions, though one stands twice in the file
    name = first.answers[0][:4]
    assert first.text.endswith(f"[On {name}]\n{name} at 0.\n\nQuestion: Who is {name}?\nAnswer:")
    assert task.score(first, f"It is {name}, I think") == 1
    assert task.score(first, "It is he") == 0
    assert len({tuple(draw(task, index).answers) for index in range(200)}) == 100


def test_the_end_of_the_documents_is_lost_but_no_example_and_no_question(tmp_path):
    long = {"title": "On X", "text": "first " + "word " * 9000 + "last"}
    write(tmp_path / "kilt/nq-dev-multikilt_1000_k20_dep6.jsonl", kilt_row("Xi", ctxs=[long]))
    write(
        tmp_path / "kilt/nq-train-multikilt_1000_k3_dep6.jsonl", kilt_row("Anna"), kilt_row("Bert")
    )
    sample = draw(opened(tmp_path, "nq"), target=2000)
    assert 0.99 * 1980 <= words(sample) <= 1980
    assert "first" in sample.prompt
    assert "last" not in sample.prompt
    assert "Answer: Anna I\n" in sample.prompt
    assert sample.text.endswith("Question: Who is Xi?\nAnswer:")


def test_popqa_leaves_well_known_subjects_out_and_never_shows_the_question_itself(tmp_path):
    rows = [kilt_row(name, id=n, s_pop=views) for n, (name, views) in enumerate(POPULAR.items())]
    write(tmp_path / "kilt/popqa_test_1000_k50_dep6.jsonl", *rows)
    write(tmp_path / "kilt/popqa_test_1000_k3_dep6.jsonl", *rows)
    task = opened(tmp_path, "popqa")
    assert task.size == 3
    for index in range(3):
        sample = draw(task, index)
        name = sample.answers[0].split()[0]
        assert name != "Rome"
        assert "Rome" not in sample.prompt
        assert sample.prompt.count(f"On {name}") == 1
        assert sample.prompt.count("Answer:") == 2


POPULAR = {"Lo": 10, "Rome": 1000, "Mi": 999, "Ka": 1.5}


def test_examples_are_of_different_questions():
    assert pick_examples(["a", "a", "b", "c"], [1, 0, 3, 2]) == [1, 3]
    assert pick_examples(["a", "a"], [0, 1]) == [0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"answers": []}, r"answers: got \[\], wanted a list of texts that are not empty"),
        ({"answers": "B"}, "answers: got 'B', wanted a list of texts that are not empty"),
        ({"answers": [[""]]}, r"answers: got .*, wanted a list of texts that are not empty"),
        ({"ctxs": [{"title": "x"}]}, "ctxs: got .*, wanted objects with 'text'"),
        ({"s_pop": 0}, "s_pop: got 0, wanted a number above 0"),
    ],
)
def test_a_broken_question_is_named(tmp_path, changed, message):
    rows = [kilt_row("A", s_pop=5), kilt_row("B", **({"s_pop": 5} | changed))]
    write(tmp_path / "kilt/popqa_test_1000_k50_dep6.jsonl", *rows)
    write(tmp_path / "kilt/popqa_test_1000_k3_dep6.jsonl", rows[0])
    with pytest.raises(ValueError, match=rf"k50_dep6\.jsonl, line 2: {message}"):
        _ = opened(tmp_path, "popqa").size


def test_worked_examples_have_to_be_there(tmp_path):
    write(tmp_path / "kilt/nq-dev-multikilt_1000_k50_dep6.jsonl", kilt_row("A"))
    with pytest.raises(ValueError, match="got no file .*k3_dep6.jsonl, wanted it for the worked"):
        opened(tmp_path, "nq")


def ranked_row(qid, labels=(0, 2, 1, 0)):
    pages = [
        {"id": str(10 + n), "text": f"page {n} of {qid}", "label": label}
        for n, label in enumerate(labels)
    ]
    return {"qid": qid, "query": f"find {qid}", "ctxs": pages}


def test_msmarco_scores_the_order_of_the_reply(tmp_path):
    write(tmp_path / "msmarco/test_reranking_data_k50_dep3.jsonl", ranked_row("q"))
    shots = [ranked_row("q"), ranked_row("r"), ranked_row("s", (0, 0, 0, 3))]
    write(tmp_path / "msmarco/test_reranking_data_k10_dep3.jsonl", *shots)
    task = opened(tmp_path, "msmarco_rerank_psg")
    sample = draw(task)
    assert "[ID: 11] page 1 of q" in sample.prompt
    assert sample.text.endswith("\n\nQuery: find q\nRanking:")
    assert sample.prompt.count("Query: find q") == 1  # not among the examples
    assert "Query: find s\nRanking: 13 > 10 > 11 > 12\n" in sample.prompt
    assert "Query: find r\nRanking: 11 > 12 > 10 > 13\n" in sample.prompt
    assert sample.answers == ("11 > 12",)
    assert task.score(sample, " 11 > 12 > 10") == pytest.approx(1)
    best = 2 + 1 / math.log2(3)
    assert task.score(sample, "ID10 > ID12 > ID11") == pytest.approx(
        (1 / math.log2(3) + 2 / math.log2(4)) / best
    )
    assert task.score(sample, "no idea") == 0


def test_msmarco_shows_no_query_that_is_asked_where_there_are_enough_others(tmp_path):
    asked = [ranked_row(f"q{n}") for n in range(3)]
    write(tmp_path / "msmarco/test_reranking_data_k50_dep3.jsonl", *asked)
    shots = [*asked, *(ranked_row(f"other{n}") for n in range(5))]
    write(tmp_path / "msmarco/test_reranking_data_k10_dep3.jsonl", *shots)
    task = opened(tmp_path, "msmarco_rerank_psg")
    for index in range(3):
        assert draw(task, index).prompt.count("find q") == 1


def test_msmarco_needs_a_relevant_document(tmp_path):
    write(tmp_path / "msmarco/test_reranking_data_k50_dep3.jsonl", ranked_row("q", (0, 0)))
    write(tmp_path / "msmarco/test_reranking_data_k10_dep3.jsonl", ranked_row("r"))
    with pytest.raises(ValueError, match=r"line 1: ctxs: got no label above 0, wanted at least"):
        draw(opened(tmp_path, "msmarco_rerank_psg"))


# ------------------------------------------------------------------------------------------------------- citations
DOCS = [{"title": f"T{n}", "text": f"text {n}"} for n in range(1, 80)]
PROMPTS = {
    "instruction": "Do it.",
    "demo_sep": "\n",
    "demo_prompt": "{instruction} Q: {question} {context} A: {answer}",
    "doc_prompt": "<{ID} {title}> {text}",
    "demos": [{"question": f"q{n}", "answer": f"a{n}", "docs": DOCS[:1]} for n in range(3)],
}


def alce(folder, **rows):
    for name, row in rows.items():
        path = folder / f"data/alce/{name}_eval_gtr_top2000.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([{"question": "Which?", "docs": DOCS, **row}]))
    return folder


def test_alce_takes_as_many_documents_as_the_length_has_and_scores_the_answers(tmp_path):
    pairs = [{"short_answers": ["Rome", "Roma"]}, {"short_answers": ["Oslo"]}]
    alce(tmp_path, asqa={"qa_pairs": pairs}, qampari={"answers": [["Rome"], ["Oslo"]]})
    task = opened(tmp_path, "alce_asqa")
    sample = draw(task)
    assert (task.wording, task.metric, task.reply_tokens) == ("own", "string_em", 300)
    assert "[30] T30\ntext 30" in sample.prompt
    assert "T31" not in sample.prompt
    assert "T75" in draw(task, target=20_000).prompt
    assert task.score(sample, "Roma [1][2].\n\nOr Os[3]lo") == 1  # marks are dropped
    assert task.score(sample, "Roma, Rome") == 0.5
    task = opened(tmp_path, "alce_qampari")
    assert task.score(draw(task), "Roman, Oslo [2].") == 0.5


def test_alce_takes_the_users_own_prompts(tmp_path):
    alce(tmp_path, qampari={"answers": [["Rome"]]})
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/qampari_revised.json").write_text(json.dumps(PROMPTS))
    task = opened(tmp_path, "alce_qampari")
    assert task.wording == "suite"
    text = draw(task).text
    assert text.count("Do it. Q: q") == 2
    assert "<1 T1> text 1 A: a" in text
    assert "\n\n\nDo it.\n\nQuestion: Which?\n\n<1 T1> text 1\n\n<2 T2> text 2\n\n" in text
    assert text.endswith("<30 T30> text 30\n\nAnswer:")
    broken = PROMPTS | {"demo_prompt": "{instruction} {answers}"}
    (tmp_path / "prompts/qampari_revised.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=r"qampari_revised.json: got KeyError\('answers'\)"):
        opened(tmp_path, "alce_qampari")


def test_alce_without_answers_is_named(tmp_path):
    alce(tmp_path, asqa={"qa_pairs": [{"short_answers": []}]})
    with pytest.raises(ValueError, match=r"asqa_eval_gtr_top2000.json, entry 1: answers: got"):
        opened(tmp_path, "alce_asqa")


# -------------------------------------------------------------------------------------------------------- many shots
def test_many_shots_come_in_balanced_rounds_with_numbers_for_labels(tmp_path):
    train = [{"text": f"about {n % 6} {n}", "label": f"L{n % 6}"} for n in range(120)]
    test = [{"text": f"ask {n} {k}", "label": f"L{n}"} for n in range(6) for k in range(2)]
    write(tmp_path / "icl/trec_coarse/train.jsonl", *train)
    write(tmp_path / "icl/trec_coarse/test.jsonl", *test)
    task = opened(tmp_path, "trec_coarse")
    assert (task.size, task.stop, task.reply_tokens) == (12, ("\n",), 20)
    mappings = set()
    for index in range(task.size):
        sample = draw(task, index, target=8192)  # 400 shots
        body = sample.prompt.split("\n\n", 1)[1].rsplit("\n\n", 1)[0]
        shots = [block.split("\nlabel: ") for block in body.split("\n\n")]
        assert len(shots) == 400
        meaning = {said.split()[1]: label for said, label in shots}
        assert sorted(meaning.values()) == list("012345")
        assert {said.split()[1]: label for said, label in reversed(shots)} == meaning
        for start in range(0, 396, 6):  # 66 whole rounds
            assert len({label for _, label in shots[start : start + 6]}) == 6
        assert sample.answers == (meaning[test[index]["label"][1:]],)
        assert sample.text.endswith(f"\n\n{test[index]['text']}\nlabel:")
        mappings.add(tuple(sorted(meaning.items())))
    assert len(mappings) > 6  # drawn anew for each text asked
    assert len(draw(task, 0, target=4096).prompt.split("\nlabel: ")) - 1 == 200
    assert draw(task, 3) == draw(task, 3)


def test_a_label_is_right_only_alone(tmp_path):
    rows = [{"text": f"t{n}", "label": n % 3} for n in range(9)]
    write(tmp_path / "icl/trec_coarse/train.jsonl", *rows)
    write(tmp_path / "icl/trec_coarse/test.jsonl", rows[0])
    task = opened(tmp_path, "trec_coarse")
    sample = draw(task)
    (label,) = sample.answers
    assert task.score(sample, f" {label}") == 1
    assert task.score(sample, f"I say so\nlabel: {label}") == 1
    assert task.score(sample, f" {label}{label}") == 0
    assert task.score(sample, f" {label} or 7") == 0


def test_a_set_in_one_file_keeps_a_tenth_to_ask(tmp_path):
    write(tmp_path / "icl/nlu/train.jsonl", *({"text": f"t{n}", "label": n % 2} for n in range(30)))
    task = opened(tmp_path, "nlu")
    assert task.size == 3
    for index in range(3):
        asked = draw(task, index).text.rsplit("\n\n", 1)[1].removesuffix("\nlabel:")
        assert draw(task, index).prompt.count(f"{asked}\n") == 0  # never among the examples


def test_more_labels_than_the_set_has_are_refused(tmp_path):
    write(tmp_path / "icl/trec_coarse/train.jsonl", *({"text": "t", "label": n} for n in range(7)))
    with pytest.raises(ValueError, match=r"train.jsonl: got 7 labels, wanted at most 6"):
        opened(tmp_path, "trec_coarse")


# ------------------------------------------------------------------------------------------------------------- books
def test_books_are_asked_after_two_other_questions_and_scored_by_their_metrics(tmp_path):
    rows = [
        {"id": n, "context": f"Book {n}.", "input": f"q{n}?", "answer": [f"red hen {n}"]}
        for n in range(4)
    ]
    write(tmp_path / "infbench/longbook_qa_eng.jsonl", *rows)
    task = opened(tmp_path, "infbench_qa")
    assert (task.size, task.metric, task.reply_tokens) == (4, "rouge_l", 10)
    for index in range(4):
        sample = draw(task, index)
        own = sample.answers[0][-1]
        assert sample.prompt.count("Question: q") == 3
        assert sample.prompt.count("Book") == 1
        assert sample.text.endswith(f"Book {own}.\n\nQuestion: q{own}?\nAnswer:")
        assert task.score(sample, f"the red hens {own}") == pytest.approx(2 * 3 / 7)

    options = ["a fox", "a hen", "a cow", "a pig"]
    rows = [row | {"options": options, "answer": "a hen"} for row in rows]
    write(tmp_path / "infbench/longbook_choice_eng.jsonl", *rows)
    task = opened(tmp_path, "infbench_choice")
    sample = draw(task)
    assert sample.answers == ("B", "B. a hen")
    assert sample.text.endswith("A. a fox\nB. a hen\nC. a cow\nD. a pig\nAnswer:")
    assert "D. a pig\nAnswer: B\n\n" in sample.prompt
    for reply, score in ((" B", 1), ("b.\nC", 1), ("It is B. A hen", 1), ("B or C", 0), ("A", 0)):
        assert task.score(sample, reply) == score
