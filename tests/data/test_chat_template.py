"""Chat templates: the environment real templates expect, and nothing more."""

import datetime

import pytest

from jaxtopk.data.chat_template import render_chat

USER = [{"role": "user", "content": "héllo <b>"}]


def test_blocks_are_trimmed():
    source = "{% for m in messages %}\n    {% if true %}\n[{{ m.content }}]\n    {% endif %}\n{% endfor %}\n"
    assert render_chat(source, USER) == "[héllo <b>]\n"


def test_generation_prompt_and_special_tokens_reach_the_template():
    source = "{{ bos_token }}{{ messages[0]['role'] }}{% if add_generation_prompt %}>{% endif %}"
    tokens = {"bos_token": "<s>"}
    assert render_chat(source, USER, special_tokens=tokens) == "<s>user>"
    assert (
        render_chat(source, USER, add_generation_prompt=False, special_tokens=tokens) == "<s>user"
    )


def test_helpers_of_the_usual_environment_are_there():
    assert (
        render_chat("{{ messages[0] | tojson }}", USER)
        == '{"role": "user", "content": "héllo <b>"}'
    )
    assert render_chat("{{ strftime_now('%Y') }}", USER) == str(datetime.date.today().year)
    source = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render_chat(source, USER) == "01"
    source = "{% generation %}{{ messages[0].content }}{% endgeneration %}!"
    assert render_chat(source, USER) == "héllo <b>!"
    assert render_chat("{% if tools %}tools{% else %}none{% endif %}", USER) == "none"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "got roles must alternate"),
        ("{% if %}", "chat template: got"),
        ("{{ messages[0].content.nothing.at.all }}", "chat template: got"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
    ids=["raised", "syntax", "undefined", "sandbox", "mutation"],
)
def test_templates_that_fail_or_reach_out_are_one_error(source, message):
    with pytest.raises(ValueError, match=message):
        render_chat(source, USER)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: got an empty sequence"),
        ([*USER, {"role": "user"}], r"messages\[1\]: got \{'role': 'user'\}, wanted a mapping"),
    ],
)
def test_messages_without_role_or_content_are_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        render_chat("{{ messages }}", messages)


def test_template_cannot_change_the_messages():
    render_chat("{% set _ = messages[0] %}{{ _.content }}", USER)
    assert USER == [{"role": "user", "content": "héllo <b>"}]
