"""Readers of RULER, LongBench v2 and InfiniteBench on small hand-made folders, and what goes wrong with such folders."""

import json

import pytest

from jaxtopk.evaluation.suites import SUITES, not_run, open_suite
from jaxtopk.evaluation.suites.base import Draft, fit


def words(sample):
    """A tokenizer of sorts: a token every four characters."""
    return -(-len(sample.text) // 4)


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def draw(task, index=0, target=4000, seed=0):
    return task.sample(index, seed=seed, target_tokens=target, count_tokens=words)


# ------------------------------------------------------------------------------------------------------------- RULER
def ruler_row(**changed):
    row = {"index": 0, "input": "Long text. The number of fox is 123. Ask:", "outputs": ["123"]}
    return {**row, "length": 64, **changed}


@pytest.mark.parametrize(
    "file",
    ["vt/validation.jsonl", "data/vt/validation.jsonl", "data/vt.jsonl", "vt.jsonl"],
)
def test_ruler_is_found_in_each_of_its_layouts(tmp_path, file):
    write(tmp_path / file, ruler_row(), ruler_row(outputs=["a", "b"]))
    (task,) = open_suite("ruler", tmp_path)
    assert (task.name, task.size, task.reply_tokens, task.stop) == ("ruler.vt", 2, 30, ())
    assert (task.wording, task.metric, task.aggregation) == ("suite", "string_match_all", False)
    sample = draw(task, 1)
    assert sample.text == ruler_row()["input"]  # to the letter, no line added
    assert task.score(sample, "A and c") == 0.5


def test_ruler_questions_need_one_answer_and_the_other_tasks_all(tmp_path):
    write(tmp_path / "qa_1/validation.jsonl", ruler_row(outputs=["one", "two"]))
    write(tmp_path / "cwe/validation.jsonl", ruler_row(outputs=["one", "two"]))
    write(tmp_path / "niah_multikey_1/validation.jsonl", ruler_row(answer_prefix=" It is"))
    niah, cwe, question = open_suite("ruler", tmp_path)  # in the suite's order
    assert question.score(draw(question), "Two!") == 1
    assert cwe.score(draw(cwe), "Two!") == 0.5
    assert cwe.aggregation
    sample = draw(niah)
    assert (sample.reply_start, sample.text[-12:]) == (" It is", ". Ask: It is")
    assert sample.depth == sample.prompt.index("123") / len(sample.prompt)


def test_a_ruler_prompt_is_never_cut(tmp_path):
    write(tmp_path / "cwe.jsonl", ruler_row(input="x " * 800))
    (task,) = open_suite("ruler", tmp_path)
    assert len(draw(task, target=520).prompt) == 1600  # 400 tokens and 120 of reply
    with pytest.raises(
        ValueError, match=r"cwe, sample 0: target_tokens got 519, wanted at least 520"
    ):
        draw(task, target=519)
    with pytest.raises(ValueError, match="index got 1, wanted 0 to 0"):
        draw(task, 1)


# ----------------------------------------------------------------------------------------------------- LongBench v2
def longbench_row(**changed):
    return {
        "_id": "1",
        "domain": "Code",
        "sub_domain": "Repositories",
        "difficulty": "easy",
        "length": "short",
        "question": "Which one? ",
        "choice_A": "one",
        "choice_B": "two",
        "choice_C": "three",
        "choice_D": "four",
        "answer": "C",
        "context": "Start of it. " + "middle " * 2000 + "The end.",
        **changed,
    }


def longbench(folder, *rows, template=None):
    (folder / "data.json").write_text(json.dumps(list(rows)))
    if template is not None:
        (folder / "prompts").mkdir()
        (folder / "prompts/0shot.txt").write_text(template)
    return folder


def test_longbench_takes_the_users_own_template(tmp_path):
    template = "Text: $DOC$ / $Q$ / (A) $C_A$ (B) $C_B$ (C) $C_C$ (D) $C_D$!"
    row = longbench_row(context=" All of $Q$ it. ")
    (task,) = open_suite("longbench_v2", longbench(tmp_path, row, template=template))
    sample = draw(task)
    # What looks like a slot inside a text stays as it is.
    assert sample.text == "Text: All of $Q$ it. / Which one? / (A) one (B) two (C) three (D) four!"
    assert (task.wording, task.reply_tokens, task.stop) == ("suite", 128, ())
    assert dict(sample.meta) == {
        "difficulty": "easy",
        "length": "short",
        "domain": "Code",
        "sub_domain": "Repositories",
    }
    assert task.score(sample, "I say: The correct answer is (C).") == 1
    assert task.score(sample, "C") == 0


def test_longbench_without_templates_is_marked_and_opens_the_reply(tmp_path):
    longbench(tmp_path, longbench_row())
    (task,) = open_suite("longbench_v2", tmp_path)
    assert task.wording == "own"
    sample = draw(task, target=10**6)
    assert task.score(sample, "C) three") == 1
    assert task.score(sample, "D) four") == 0
    (chatty,) = open_suite("longbench_v2", tmp_path, model_chat=True)
    sample = draw(chatty, target=10**6)
    assert (sample.reply_start, sample.text) == ("", sample.prompt)
    assert chatty.score(sample, "C) three") == 0


def test_longbench_loses_the_middle(tmp_path):
    (task,) = open_suite("longbench_v2", longbench(tmp_path, longbench_row()))
    sample = draw(task, target=1000)
    assert 0.99 * (1000 - 128) <= words(sample) <= 1000 - 128
    assert "Start of it." in sample.prompt
    assert "The end." in sample.prompt
    lost = int(dict(sample.meta)["characters_cut"])
    assert len(draw(task, target=10**6).prompt) - len(sample.prompt) == lost


def test_longbench_refuses_a_template_without_its_slots(tmp_path):
    longbench(tmp_path, longbench_row(), template="$DOC$ $Q$ $C_A$ $C_B$ $C_C$")
    with pytest.raises(ValueError, match=r"0shot.txt: got 0 slots \$C_D\$, wanted 1"):
        open_suite("longbench_v2", tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"answer": "E"}, "entry 2: answer: got 'E', wanted one of A, B, C, D"),
        ({"difficulty": None}, "entry 2: difficulty: got None, wanted one of easy, hard"),
        ({"choice_B": ""}, "entry 2: choice_B: got '', wanted text"),
    ],
)
def test_longbench_names_the_entry_that_is_broken(tmp_path, changed, message):
    longbench(tmp_path, longbench_row(), longbench_row(**changed))
    with pytest.raises(ValueError, match=rf"data.json, {message}"):
        open_suite("longbench_v2", tmp_path)


# ----------------------------------------------------------------------------------------------------- InfiniteBench
OPTIONS = ["a fox", "a hen", "a cow", "a pig"]
# Answer and options of each file, a right reply, one that is half right or wrong, and its score.
INFINITE = {
    "passkey": (["71432"], None, " 71432. ok", "the 7143", 0),
    "number_string": ("0011223344", None, " 0011223344", "11223344", 0),
    "kv_retrieval": ("ab-12", None, '"ab-12"', "ab-1", 0),
    "math_find": ([7], None, " 7", "8", 0),
    "math_calc": ([5, 7, 3, 1], None, "[5, 7, 3, 1]", "[5, 7, 4, 1]", 0.5),
    "code_run": ([-3], None, "is -3.", "3", 0),
    "code_debug": (["a hen"], OPTIONS, "B", "C", 0),
    "longbook_choice_eng": (["a hen", "B"], OPTIONS, " B.", "A", 0),
    "longbook_qa_eng": (["black hen", "x"], None, "the black hen", "red hen", 0.5),
    "longbook_sum_eng": ("a b c d", None, "a b c d", "a b x y", 0.5),
    "longdialogue_qa_eng": (["HEN"], None, "Hen, I think", "Cow", 0),
}


def infinite_row(name, **changed):
    answer, options = INFINITE[name][:2]
    row = {"id": 0, "context": "Much text. " * 50, "input": "What?", "answer": answer}
    return row | ({"options": options} if options else {}) | changed


@pytest.mark.parametrize("name", INFINITE)
def test_each_infinitebench_task_scores_right_and_wrong_replies(tmp_path, name):
    write(tmp_path / f"{name}.jsonl", infinite_row(name))
    (task,) = open_suite("infinitebench", tmp_path, subtasks=[name])
    _, _, right, other, score = INFINITE[name]
    sample = draw(task, target=40_000)
    assert task.score(sample, right) == 1
    assert task.score(sample, other) == pytest.approx(score)
    assert task.score(sample, "") == 0
    assert (task.wording, task.size) == ("own", 1)
    assert ("What?" in sample.prompt) == ("{input}" in SUITES["infinitebench"].KINDS[name].after)
    assert all(option in sample.prompt for option in INFINITE[name][1] or ())
    (chatty,) = open_suite("infinitebench", tmp_path, subtasks=[name], model_chat=True)
    assert draw(chatty, target=40_000).text == sample.prompt


def test_infinitebench_loses_the_middle_and_keeps_the_needle_where_it_is(tmp_path):
    context = "begin " + "gap " * 5000 + "The key is 71432. " + "gap " * 400 + "finish"
    write(tmp_path / "passkey.jsonl", infinite_row("passkey", context=context))
    (task,) = open_suite("infinitebench", tmp_path)
    sample = draw(task, target=1006)
    assert 0.99 * 1000 <= words(sample) <= 1000
    assert sample.prompt.count("begin") == sample.prompt.count("finish") == 1
    assert sample.depth == sample.prompt.index("71432") / len(sample.prompt)
    assert draw(task, target=400).depth is None  # the needle was in what is lost


def test_infinitebench_asks_for_as_many_tokens_as_its_sums_have(tmp_path):
    write(tmp_path / "math_calc.jsonl", infinite_row("math_calc"))
    (task,) = open_suite("infinitebench", tmp_path)
    with pytest.raises(ValueError, match=r"target_tokens got 4000, wanted at least 300\d\d"):
        draw(task)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("passkey", {"answer": []}, "answer: got an empty list, wanted at least one answer"),
        ("passkey", {"answer": [" "]}, "answer: got an empty answer, wanted text or a number"),
        ("passkey", {"context": 3}, "context: got 3, wanted text"),
        ("math_find", {"answer": ["many"]}, "answer: got 'many', wanted a number"),
        ("code_run", {"answer": [1.5]}, "answer: got '1.5', wanted an integer"),
        ("code_debug", {"options": ["a"]}, "options: got .*, wanted four texts"),
        ("code_debug", {"answer": ["a dog"]}, "answer: got 'a dog', wanted one of the options"),
    ],
)
def test_a_broken_line_is_named(tmp_path, name, changed, message):
    write(tmp_path / f"{name}.jsonl", infinite_row(name), infinite_row(name, **changed))
    with pytest.raises(ValueError, match=rf"{name}\.jsonl, line 2: {message}"):
        open_suite("infinitebench", tmp_path)


# ------------------------------------------------------------------------------------------------- folders and files
@pytest.mark.parametrize("suite", SUITES)
def test_a_missing_folder_or_file_says_what_to_get_in_one_line(tmp_path, suite):
    with pytest.raises(
        ValueError, match=rf"{suite}: got no folder .*absent, wanted one: "
    ) as error:
        open_suite(suite, tmp_path / "absent")
    assert "FOLDER" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=rf"{suite}: got no files of .* wanted them: .*FOLDER"):
        open_suite(suite, tmp_path)


def test_sub_tasks_without_files_are_left_out_unless_asked_for(tmp_path, caplog):
    write(tmp_path / "vt.jsonl", ruler_row())
    assert [task.name for task in open_suite("ruler", tmp_path)] == ["ruler.vt"]
    assert "no files of niah_single_1" in caplog.text
    with pytest.raises(ValueError, match="ruler: got no files of cwe in"):
        open_suite("ruler", tmp_path, subtasks=["vt", "cwe"])


def test_unknown_names_are_answered_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="suite: got 'infinitbench', wanted one of infinitebench"):
        open_suite("infinitbench", tmp_path)
    with pytest.raises(
        ValueError, match="ruler: sub-task: got 'niah_singel_1', wanted one of niah_"
    ):
        open_suite("ruler", tmp_path, subtasks=["niah_singel_1"])
    with pytest.raises(ValueError, match="subtasks: got none, wanted at least one"):
        open_suite("ruler", tmp_path, subtasks=[])


def test_what_needs_a_judge_is_refused_with_the_reason(tmp_path):
    assert "judge" in not_run("helmet")["narrativeqa"]
    with pytest.raises(
        ValueError, match="got narrativeqa, which is not run: its score needs a judge"
    ):
        open_suite("helmet", tmp_path, subtasks=["narrativeqa"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n{}\n{broken\n", "line 2: input: got nothing, wanted text"),
        (b'{"input": "x", "outputs": ["y"]}\n\n{broken\n', "line 3: got invalid JSON .*"),
        (b'{"input": "x", "outputs": ["\xff"]}\n', "line 1: got invalid JSON .*"),
        (b"3\n", "line 1: got int, wanted a JSON object"),
        (b"", "got an empty file, wanted a JSON object a line"),
        (b"[]", "got an empty list, wanted a list of JSON objects"),
        (b"[3]", "entry 1: got int, wanted a JSON object"),
        (b'{"input": "x", "outputs": []}', "line 1: outputs: got an empty list, wanted .*"),
        (b'{"input": "x", "outputs": [{}]}', "line 1: outputs: got {}, wanted texts or numbers"),
    ],
)
def test_a_file_that_is_no_json_is_named_with_its_line(tmp_path, content, message):
    (tmp_path / "vt.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"vt\.jsonl(, |: ){message}$"):
        open_suite("ruler", tmp_path)


# ----------------------------------------------------------------------------------------------------------- cutting
def test_a_context_is_cut_with_few_encodings_however_long_it_is():
    draft = Draft(context="x" * 4_000_000, after="?", reply_start="A", answers=("a",))
    calls = []

    def count(sample):
        calls.append(len(sample.text))
        return words(sample)

    sample, size = fit(draft, 10_000, keep="start", count_tokens=count)
    assert 0.995 * 10_000 <= size <= 10_000
    assert size == words(sample)
    assert len(calls) <= 6
    assert max(calls) < 100_000  # never the whole text


@pytest.mark.parametrize("keep", ["start", "ends"])
def test_uneven_tokens_still_fit(keep):
    # A token a character in the first part, one for eight in the second.
    draft = Draft(context="#" * 3000 + "x" * 60_000, after="?", reply_start="A", answers=("a",))
    count = lambda sample: sample.text.count("#") + len(sample.text) // 8
    for limit in (50, 777, 2000, 5000, 9000):
        _, size = fit(draft, limit, keep=keep, count_tokens=count)
        assert 0.97 * limit <= size <= limit


def test_what_fits_is_never_cut_and_what_cannot_fit_is_refused():
    draft = Draft(context="x" * 400, after="y" * 40, reply_start="", joint="", answers=("a",))
    sample, size = fit(draft, 110, keep="start", count_tokens=words)
    assert (size, len(sample.prompt), sample.meta) == (110, 440, ())
    sample, size = fit(draft, 109, keep="start", count_tokens=words)
    assert (size, sample.meta) == (109, (("characters_cut", "4"),))
    assert fit(draft, 9, keep="ends", count_tokens=words) == (None, 10)
    assert fit(draft, -5, keep="ends", count_tokens=words) == (None, 10)
