"""Settings: what they are called, which share a prefill and a loop, and how many keys they attend to."""

import pytest

from jaxtopk.attention import FullAttention, TopKAttention
from jaxtopk.evaluation.settings import Setting, group_settings, keys_attended, make_settings
from tests.evaluation import tiny


def test_full_comes_first_then_ratios_then_numbers():
    settings = make_settings(ratios=(0.5, 0.015), topks=(64,), options={"scope": "group"})
    assert [setting.name for setting in settings] == ["full", "top-k 50%", "top-k 1.5%", "top-k 64"]
    assert settings[2].strategy == TopKAttention(topk_ratio=0.015, scope="group")
    assert [setting.ratio for setting in settings] == [None, 0.5, 0.015, None]
    assert [setting.topk for setting in settings] == [None, None, None, 64]
    assert [setting.name for setting in make_settings()] == ["full"]
    assert len(make_settings(attention=("topk",), ratios=(0.5,))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratios": (0.5, 0.5)}, "settings: got top-k 50% twice"),
        ({"topks": (3, 3)}, "settings: got top-k 3 twice"),
        ({"attention": ("topk",)}, "attention: got topk without a budget"),
        ({"attention": ("full",), "topks": (3,)}, "topk: got a value for full attention"),
        ({"options": {"scope": "layer"}}, "scope: got a value for full attention"),
        ({"attention": ()}, "attention: got none"),
        ({"ratios": (1.5,)}, "topk_ratio got 1.5"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_settings(**arguments)


def test_a_setting_has_one_budget():
    with pytest.raises(ValueError, match="setting x: topk got .1, 2., wanted one budget"):
        Setting(name="x", strategy=TopKAttention(topk=(1, 2)))


def test_all_settings_of_a_full_prefill_share_it_and_budgets_of_a_kind_share_a_loop():
    (group,) = group_settings(make_settings(ratios=(0.5, 0.1), topks=(4, 8, 16)))
    assert group.strategy.suffix_tokens == 1
    assert [program.settings for program in group.programs] == [(3, 4, 5), (1, 2), (0,)]
    assert group.programs[0].strategy.topk == (4, 8, 16)
    assert group.programs[1].strategy.topk_ratio == (0.5, 0.1)
    assert group.programs[2].strategy == FullAttention()


def test_full_attention_alone_leaves_no_token_out_of_its_prefill():
    (group,) = group_settings(make_settings())
    assert group.strategy.suffix_tokens == 0


def test_sparse_prefills_are_apart():
    groups = group_settings(
        make_settings(ratios=(0.5, 0.1), topks=(4,), options={"prefill": "topk"})
    )
    assert [[program.settings for program in group.programs] for group in groups] == [
        [(1,)], [(2,)], [(3,)], [(0,)],
    ]  # fmt: skip


def test_other_suffixes_and_scopes_are_not_mixed():
    settings = [
        Setting(name="a", strategy=TopKAttention(topk=4)),
        Setting(name="b", strategy=TopKAttention(topk=8, sparse_suffix=4)),
        Setting(name="c", strategy=TopKAttention(topk=8, scope="group")),
        Setting(name="d", strategy=TopKAttention(topk=8)),
    ]
    first, second = group_settings(settings)
    assert {program.settings for program in first.programs} == {(0, 3), (2,)}
    assert [program.settings for program in second.programs] == [(1,)]


def test_keys_attended_follow_the_integer_rule_the_layers_and_the_windows():
    import dataclasses

    config = tiny.CONFIG
    attended = lambda strategy, config=config: keys_attended(strategy, config, [100, 7])
    assert attended(FullAttention()) == [100, 7]
    assert attended(TopKAttention(topk=10)) == [10, 7]
    assert attended(TopKAttention(topk_ratio=0.07)) == [7, 1]
    assert attended(TopKAttention(topk_ratio=0.07, min_topk=3)) == [7, 3]
    assert attended(TopKAttention(topk=10, layers=(1,))) == [55, 7]
    windowed = dataclasses.replace(config, windows=(None, 20))
    assert attended(TopKAttention(topk_ratio=0.5), windowed) == [30, 4]
    assert attended(FullAttention(), windowed) == [60, 7]
