"""The harness end to end on a tiny random model: what it decodes, that it resumes, shards and splits, and what it refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtopk import generate
from jaxtopk.analysis.run_folder import RunFolder
from jaxtopk.attention import TopKAttention
from jaxtopk.evaluation import batches, harness, records
from jaxtopk.evaluation.clock import Clock
from jaxtopk.evaluation.depth_grid import DepthGrid
from jaxtopk.evaluation.harness import EvaluationConfig, evaluate
from jaxtopk.evaluation.replies import Decoder, choose_batch
from jaxtopk.evaluation.settings import make_settings
from jaxtopk.evaluation.tasks.base import Sample, Task, TokenSample, TokenTask
from jaxtopk.sharding import make_mesh
from tests.evaluation import tiny

SETTINGS = make_settings(ratios=(0.5, 0.05), topks=(4,))
NAMES = [setting.name for setting in SETTINGS]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookup(Task):
    """A word, many times over, and a letter asked for; short enough for a tiny model."""

    name: str = "lookup"
    size: int | None = None
    reply_tokens: int = 6
    stop: tuple[str, ...] = ("\n",)
    empty: int | None = None

    def sample(self, index, *, seed, target_tokens, count_tokens):
        """Fills the budget; sample `empty` has no answer."""
        rng = np.random.default_rng([seed, index])
        letters = "".join(rng.choice(list("abcdefgh"), size=target_tokens // 2))
        sample = Sample(
            prompt=f"Find {letters}",
            reply_start="It is",
            answers=("e",),
            depth=index % 3 / 2,
            num_units=1,
            meta=(("kind", "odd" if index % 2 else "even"),),
        )
        if count_tokens(sample) + self.reply_tokens > target_tokens:
            raise ValueError(f"target_tokens got {target_tokens}, wanted more")
        if index == self.empty:
            object.__setattr__(sample, "answers", ("",))
        return sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(TokenTask):
    """Random tokens; what is asked begins at a place that differs between samples."""

    name: str = "recall"

    def sample(self, index, *, seed, target_tokens, vocab_size):
        """Asks at every third position of the end."""
        rng = np.random.default_rng([seed, index])
        tokens = rng.integers(0, vocab_size, size=target_tokens).tolist()
        labels = [-1] * target_tokens
        for position in range(target_tokens // 2 + index, target_tokens, 3):
            labels[position] = int(rng.integers(0, vocab_size))
        return TokenSample(tokens=tuple(tokens), labels=tuple(labels))


TASKS = (Lookup(), Recall())


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def _config(**changes) -> EvaluationConfig:
    base = {
        "model": "tiny",
        "tasks": ("lookup", "recall"),
        "lengths": (90, 100),  # of one padded shape
        "samples": 5,
        "settings": SETTINGS,
        "seed": 7,
    }
    return EvaluationConfig(**(base | changes))


def _run(model, tokenizer, path, *, tasks=TASKS, config=None, **options):
    config = config or _config()
    options = {"batch": 2} | options
    seconds = evaluate(model, tokenizer, tasks, config, RunFolder(path), **options)
    return seconds, records.read_rows(RunFolder(path), len(config.settings))


@pytest.fixture(scope="module")
def finished(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished")
    progress = []
    seconds, rows = _run(model, tokenizer, path, on_progress=lambda *entry: progress.append(entry))
    return path, rows, seconds, progress


def test_there_is_a_row_for_every_sample_and_setting(finished):
    _, rows, _, _ = finished
    assert len(rows) == 2 * 2 * 5 * len(SETTINGS)
    keys = {(row["task"], row["length"], row["index"], row["setting"]) for row in rows}
    assert len(keys) == len(rows)
    first = rows[0]
    assert first["meta"] == {"kind": "even"}
    assert first["answers"] == ["e"]
    assert first["prompt_tail"].endswith("\nIt is")
    assert first["keys_visible"] == first["prompt_tokens"]
    assert {row["keys_attended"] for row in rows if row["setting"] == "top-k 4"} == {4}
    assert all(0 <= row["score"] <= 1 for row in rows)


def test_a_reply_is_what_generation_gives_under_that_setting_alone(model, tokenizer, finished):
    _, rows, _, _ = finished
    task = Lookup()
    replies = set()
    for row in (row for row in rows if row["task"] == "lookup" and row["length"] == 100):
        if row["setting"] not in ("full", "top-k 5%"):
            continue
        sample = task.sample(row["index"], seed=7, target_tokens=100, count_tokens=lambda s: 0)
        strategy = SETTINGS[NAMES.index(row["setting"])].strategy
        wanted = generate(
            model.with_attention(strategy), tokenizer, sample.text, max_new_tokens=6, stop="\n"
        )
        assert row["reply"] == wanted
        assert row["score"] == task.score(sample, wanted)
        replies.add((row["index"], wanted))
    assert len(replies) > 5  # the settings do not all say the same


def test_predictions_are_those_of_a_forward_pass(model, tokenizer):
    settings = make_settings(attention=("topk",), topks=(3,), options={"prefill": "topk"})
    samples = [
        Recall().sample(index, seed=7, target_tokens=40, vocab_size=97) for index in range(3)
    ]
    found = Decoder(model, tokenizer, settings).predictions(samples)
    for setting, of_setting in zip(settings, found, strict=True):
        forward = jax.jit(model.with_attention(setting.strategy))
        for sample, predictions in zip(samples, of_setting, strict=True):
            likely = np.argmax(forward(jnp.asarray([sample.tokens]))[0], axis=-1).tolist()
            first = sample.first_label
            assert predictions == [-1] * first + likely[first:]


def test_before_the_first_label_rows_are_full_and_after_it_sparse(model, tokenizer):
    # With a full prefill the first asked row sees dense rows' keys and values; no later row does better than that.
    settings = make_settings(attention=("topk",), topks=(2,))
    sample = Recall().sample(0, seed=1, target_tokens=40, vocab_size=97)
    ((found,),) = Decoder(model, tokenizer, settings).predictions([sample])
    first = sample.first_label
    tokens = jnp.asarray([sample.tokens])
    rows = np.arange(40)[None] >= first
    wanted = jax.jit(
        lambda tokens: model.with_attention(TopKAttention(topk=2))(
            tokens, sparse_rows=jnp.asarray(rows)
        )
    )(tokens)
    assert found[first:] == np.argmax(wanted[0], axis=-1).tolist()[first:]


def test_times_and_progress_are_told(finished):
    path, _, seconds, progress = finished
    assert set(seconds) == {"prefill", "decode", "host", "compile", "total", "drawing"}
    assert seconds["compile"] > 0.05
    spent = sum(seconds[name] for name in ("prefill", "decode", "host", "compile"))
    assert 0.3 * seconds["total"] < spent <= seconds["total"] + 0.05
    done = [entry[0] for entry in progress]
    assert done == sorted(done)
    assert progress[-1][:2] == (20, 20)
    started, ended = harness.sessions(RunFolder(path))
    assert started["platform"] == "cpu"
    assert ended["seconds"]["decode"] == pytest.approx(seconds["decode"], rel=1e-5)


def test_a_finished_folder_decodes_nothing_again(finished, model, tokenizer, monkeypatch):
    path, rows, _, _ = finished
    before = (path / "results.jsonl").read_bytes()
    monkeypatch.setattr(Decoder, "replies", lambda *a, **k: pytest.fail("decoded again"))
    _, again = _run(model, tokenizer, path)
    assert (path / "results.jsonl").read_bytes() == before
    assert again == rows


def test_a_folder_grows_to_the_rows_of_one_run(finished, model, tokenizer, tmp_path):
    _, wanted, _, _ = finished
    small = _config(tasks=("lookup",), lengths=(100,), samples=3)
    _run(model, tokenizer, tmp_path, tasks=TASKS[:1], config=small)
    _, rows = _run(model, tokenizer, tmp_path)
    order = lambda row: (row["length"], row["task"], row["index"])
    assert sorted(rows, key=order) == sorted(wanted, key=order)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["tasks"], config["lengths"], config["samples"]) == (
        ["lookup", "recall"], [100, 90], 5,
    )  # fmt: skip
    # Back to the small one: what is there stays, and still agrees.
    _run(model, tokenizer, tmp_path, tasks=TASKS[:1], config=small)
    assert json.loads((tmp_path / "config.json").read_text()) == config


def test_a_run_of_few_minutes_stops_after_a_batch_and_goes_on(finished, model, tokenizer, tmp_path):
    path, _, _, _ = finished
    whole = (path / "results.jsonl").read_bytes()
    sizes = []
    for _ in range(12):
        _run(model, tokenizer, tmp_path, minutes=1e-9)
        sizes.append((tmp_path / "results.jsonl").stat().st_size)
    assert sizes == sorted(set(sizes))  # each run did something
    assert (tmp_path / "results.jsonl").read_bytes() == whole


@pytest.mark.parametrize("cut", [1, 400, 1100], ids=lambda cut: f"{cut} bytes")
def test_a_torn_sample_is_cut_off_and_done_again(finished, model, tokenizer, tmp_path, cut, caplog):
    path, wanted, _, _ = finished
    whole = (path / "results.jsonl").read_bytes()
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    (tmp_path / "results.jsonl").write_bytes(whole[:-cut])
    _run(model, tokenizer, tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes() == whole
    assert "results.jsonl: cut off" in caplog.text


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("axes", "tasks"),
    [
        ({"data": 8}, TASKS),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, TASKS[:1], marks=pytest.mark.slow),
    ],
    ids=["data", "all axes"],
)
def test_a_mesh_gives_the_same_rows(finished, model, tokenizer, tmp_path, axes, tasks):
    _, rows, _, _ = finished
    names = tuple(task.name for task in tasks)
    wanted = [row for row in rows if row["length"] == 100 and row["task"] in names]
    mesh = make_mesh(**({"fsdp": 1} | axes))
    config = _config(lengths=(100,), tasks=names)
    _, found = _run(model, tokenizer, tmp_path, tasks=tasks, config=config, batch=8, mesh=mesh)
    assert found == wanted


def test_parts_share_a_folder(finished, model, tokenizer, tmp_path):
    _, wanted, _, _ = finished
    for part in (1, 0):
        _run(model, tokenizer, tmp_path, part=part, parts=2)
    assert sorted(path.name for path in tmp_path.glob("results*")) == [
        "results.1.jsonl",
        "results.jsonl",
    ]
    rows = records.read_rows(RunFolder(tmp_path), len(SETTINGS))
    order = lambda row: (row["length"], row["task"], row["index"])
    assert sorted(rows, key=order) == sorted(wanted, key=order)
    first = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["index"] for row in first} == {0, 2, 4}


def test_parts_cover_every_sample_once():
    for parts in (1, 3, 7):
        found = [index for part in range(parts) for index in batches.own_indices(10, part, parts)]
        assert sorted(found) == list(range(10))
    with pytest.raises(ValueError, match="part: got 2 of 2, wanted 0 to 1"):
        batches.own_indices(10, 2, 2)


def test_batches_go_by_length_and_do_not_depend_on_what_is_done():
    cut = batches.cut_batches(
        [Lookup(), Lookup(name="few", size=2)],
        (32, 16),
        samples=5,
        size=lambda length: 64 // length,
    )
    assert [(b.length, b.task.name, b.indices) for b in cut] == [
        (16, "lookup", (0, 1, 2, 3)),
        (16, "lookup", (4,)),
        (16, "few", (0, 1)),
        (32, "lookup", (0, 1)),
        (32, "lookup", (2, 3)),
        (32, "lookup", (4,)),
        (32, "few", (0, 1)),
    ]


def test_drawing_goes_ahead_of_the_caller():
    tasks = [batches.Batch(task=Lookup(), length=1, indices=(index,)) for index in range(6)]
    drawn = []
    ahead = batches.drawn_ahead(tasks, lambda batch: drawn.append(batch.indices) or [])
    assert next(ahead).batch.indices == (0,)
    assert [found.batch.indices for found in ahead] == [(index,) for index in range(1, 6)]
    assert drawn == [(index,) for index in range(6)]


def test_a_chat_goes_through_the_template_and_begins_the_reply(tokenizer):
    sample = Lookup().sample(0, seed=0, target_tokens=40, count_tokens=lambda sample: 0)
    read = lambda chat: tokenizer.decode(batches.encode(tokenizer, sample, chat=chat))
    assert read(False) == f"{sample.prompt}\nIt is"
    assert read(True) == f"[{sample.prompt}]It is"


def test_the_batch_follows_the_memory(model, tokenizer):
    decoder = Decoder(model, tokenizer, SETTINGS)
    each = decoder.sequence_bytes(512)
    assert decoder.sequence_bytes(1024) == 2 * each
    assert choose_batch(decoder, 512, memory=int(each * 1.5 * 9)) == 8
    assert choose_batch(decoder, 512, memory=int(each * 1.5 * 9), multiple=4) == 32
    assert choose_batch(decoder, 512, memory=10**15) == 64
    assert choose_batch(decoder, 512, memory=1) == 1
    assert choose_batch(decoder, 512) == 4  # a CPU does not tell


def test_the_clock_tells_compiling_from_running():
    with Clock("work") as clock, clock.phase("work"):
        jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((7, 7))).block_until_ready()
    assert clock.seconds["compile"] > 0.005
    before = dict(clock.seconds)
    jax.jit(lambda x: jnp.cos(x) @ x.T)(jnp.ones((7, 7))).block_until_ready()
    assert clock.seconds == before  # it listens no more


def test_a_depth_grid_takes_its_depths_in_turn():
    from jaxtopk.evaluation.tasks.niah import NeedleInHaystack

    grid = DepthGrid(task=NeedleInHaystack(), depths=(0.0, 1.0))
    draw = lambda index: grid.sample(
        index, seed=0, target_tokens=500, count_tokens=lambda sample: len(sample.text) // 4
    )
    assert [draw(index).depth for index in range(3)] == [0.0, 1.0, 0.0]
    place = lambda sample: sample.prompt.index(sample.answers[0]) / len(sample.prompt)
    assert place(draw(0)) < 0.3 < 0.7 < place(draw(1))
    assert grid.name == "niah"
    for depths, message in (((), "depths: got"), ((0.5, 0.5), "each once"), ((2.0,), "depth: got")):
        with pytest.raises(ValueError, match=message):
            DepthGrid(task=NeedleInHaystack(), depths=depths)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (0,)}, "lengths: got 0, wanted at least 1"),
        ({"lengths": ()}, "lengths: got none"),
        ({"lengths": (8, 8)}, "lengths: got 8 twice"),
        ({"tasks": ("a", "a")}, "tasks: got a twice"),
        ({"samples": 0}, "samples: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"settings": ()}, "settings: got none"),
        ({"settings": SETTINGS[:1] * 2}, "settings: got full twice"),
    ],
)
def test_a_bad_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 8}, "seed is 8 now, wanted 7 as there"),
        ({"settings": SETTINGS[:2]}, r"settings is \[.* now, wanted"),
        (
            {"settings": make_settings(ratios=(0.5, 0.04), topks=(4,))},
            r'settings\[2\].name is "top-k 4%" now, wanted "top-k 5%" as there',
        ),
        ({"made_with": {"haystack": "noise"}}, 'made_with.haystack is "noise" now, wanted null'),
    ],
)
def test_results_of_another_configuration_are_refused(
    finished, model, tokenizer, tmp_path, changes, message
):
    (tmp_path / "config.json").write_bytes((finished[0] / "config.json").read_bytes())
    (tmp_path / "results.jsonl").write_bytes((finished[0] / "results.jsonl").read_bytes())
    with pytest.raises(ValueError, match=f"out: got results of another configuration.*{message}"):
        _run(model, tokenizer, tmp_path, config=_config(**changes))


def test_bad_input_is_found_before_any_decoding(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(Decoder, "replies", lambda *a, **k: pytest.fail("decoded"))
    run = lambda **options: _run(model, tokenizer, tmp_path / "new", **options)
    lookup = {"config": _config(tasks=("lookup",)), "tasks": TASKS[:1]}
    with pytest.raises(
        ValueError, match="lengths: got 2000, wanted at most the model's context of"
    ):
        run(config=_config(lengths=(100, 2000)))
    with pytest.raises(ValueError, match="lookup, length 12, sample 0: target_tokens got 12"):
        run(**lookup | {"config": _config(tasks=("lookup",), lengths=(100, 12))})
    with pytest.raises(ValueError, match="lookup, length 90, sample 0: answers: got"):
        run(**lookup | {"tasks": (Lookup(empty=0),)})
    with pytest.raises(ValueError, match="batch: got 0, wanted at least 1"):
        run(batch=0)
    with pytest.raises(ValueError, match="tasks: got .* wanted those of the config"):
        run(tasks=TASKS[:1])
    with pytest.raises(ValueError, match="part: got 3 of 2"):
        run(part=3, parts=2)
    assert not (tmp_path / "new").exists()


@pytest.mark.multidevice
def test_a_batch_that_the_mesh_does_not_divide_is_refused(model, tokenizer, tmp_path):
    mesh = make_mesh(data=8, fsdp=1)
    with pytest.raises(ValueError, match="batch: got 12, wanted a multiple of the 8 devices"):
        _run(model, tokenizer, tmp_path, batch=12, mesh=mesh)


def test_a_later_sample_without_an_answer_ends_the_run_with_its_name(model, tokenizer, tmp_path):
    config = _config(tasks=("lookup",), lengths=(100,))
    with pytest.raises(ValueError, match="lookup, length 100, sample 3: answers: got"):
        _run(model, tokenizer, tmp_path, config=config, tasks=(Lookup(empty=3),))
    rows = records.read_rows(RunFolder(tmp_path), len(SETTINGS))
    assert {row["index"] for row in rows} <= {0, 1, 2}
