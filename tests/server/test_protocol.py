"""What a request may hold; what it may not is refused by name."""

import json
from typing import Any

import pytest

from server.convert import engine_messages
from server.errors import InvalidRequestError
from server.protocol import parse_chat
from tests.server.fakes import chat_body

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}


def refusal_of(body: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        parse_chat(body if isinstance(body, bytes) else json.dumps(body).encode())
    return caught.value


@pytest.mark.parametrize(
    "body",
    [b'"text"', b"[1]", b"5", b"null", b"", b"{", b"{'a': 1}", b'{"a": NaN}', b'{"a": Infinity}',
     b'{"a": -Infinity}', b"\xff\xfe{}", b'{"a": "\xff"}', b"[" * 100_000, b'{"a":' * 100_000,
     b'{"seed": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    error = refusal_of(body)
    assert (error.status, error.code) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("audio", {"voice": "x", "format": "wav"}),
        ("modalities", ["text", "audio"]),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function"}),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "text", "x": 1}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("best_of", 2),
        ("echo", True),
    ],
)
def test_a_field_that_is_not_honoured_is_refused_by_name(field: str, value: Any) -> None:
    error = refusal_of(chat_body(**{field: value}))
    assert error.param == field and field in str(error)
    assert error.code == "unsupported_parameter"


def test_an_unknown_field_is_refused_by_name() -> None:
    error = refusal_of(chat_body(guided_json={}))
    assert (error.param, error.code) == ("guided_json", "unknown_parameter")


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tools": None, "tool_choice": "none", "functions": None, "audio": None},
        {"tool_choice": "auto", "function_call": "none"},
        {"modalities": ["text"], "response_format": {"type": "text"}, "best_of": 1},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "flex"},
        {"safety_identifier": "x", "prompt_cache_key": "x", "parallel_tool_calls": False},
        {"prediction": {"type": "content", "content": "x"}},
        {"temperature": None, "stop": None, "n": None, "stream": None, "logit_bias": None},
        {"stop": []},
        {"stop": "one"},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"stream": False, "stream_options": None},
        {"logprobs": True, "top_logprobs": 0},
        {"logprobs": False},
        {"temperature": 0, "top_p": 1, "seed": -(2**63)},
    ],
)
def test_what_changes_nothing_or_is_honoured_is_accepted(fields: dict[str, Any]) -> None:
    assert parse_chat(json.dumps(chat_body(**fields)).encode()).model == "tiny"


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("temperature", 2.1, "temperature"),
        ("temperature", -0.1, "temperature"),
        ("temperature", "0.5", "temperature"),
        ("temperature", True, "temperature"),
        ("top_p", 1.01, "top_p"),
        ("top_k", -2, "top_k"),
        ("top_k", 1.5, "top_k"),
        ("min_p", -1, "min_p"),
        ("max_tokens", 0, "max_tokens"),
        ("max_completion_tokens", -1, "max_completion_tokens"),
        ("max_tokens", 5.0, "max_tokens"),
        ("n", 0, "n"),
        ("seed", 2**63, "seed"),
        ("presence_penalty", 3, "presence_penalty"),
        ("frequency_penalty", -3, "frequency_penalty"),
        ("repetition_penalty", 0, "repetition_penalty"),
        ("repetition_penalty", 2.1, "repetition_penalty"),
        ("max_tokens", -2, "max_tokens"),
        ("max_tokens", -1.0, "max_tokens"),
        ("logit_bias", {"5": 101}, "logit_bias.5"),
        ("logit_bias", [5], "logit_bias"),
        ("stop", ["a", "b", "c", "d", "e"], "stop"),
        ("stop", "", "stop[0]"),
        ("stop", [5], "stop[0]"),
        ("stream", "yes", "stream"),
        ("stream_options", {"include_usage": True}, "stream_options"),
        ("top_logprobs", 5, "top_logprobs"),
        ("messages", [], "messages"),
        ("messages", "Hi", "messages"),
        ("messages", [5], "messages[0]"),
        ("messages", None, "messages"),
        ("model", None, "model"),
        ("model", 5, "model"),
    ],
)
def test_a_value_out_of_bounds_names_its_field(field: str, value: Any, param: str) -> None:
    error = refusal_of(chat_body() | {field: value})
    assert error.param == param
    assert str(error).startswith(param)


def test_top_logprobs_end_at_twenty() -> None:
    assert refusal_of(chat_body(logprobs=True, top_logprobs=21)).param == "top_logprobs"


def test_a_logit_bias_needs_token_ids() -> None:
    assert str(refusal_of(chat_body(logit_bias={"hello": 1}))).startswith("logit_bias")


def test_a_field_that_is_missing_is_named() -> None:
    error = refusal_of({"messages": chat_body()["messages"]})
    assert (error.param, str(error)) == ("model", "model: is required")


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        ({"role": "user"}, "messages[0].content", "required"),
        ({"role": "user", "content": None}, "messages[0].content", "string or an array"),
        ({"role": "user", "content": []}, "messages[0].content", "not empty"),
        ({"role": "user", "content": 5}, "messages[0].content", "string or an array"),
        ({"role": "tool", "content": "x", "tool_call_id": "y"}, "messages[0]", "'system'"),
        ({"content": "x"}, "messages[0]", "role"),
        ({"role": "user", "content": [5]}, "messages[0].content[0]", ""),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]", ""),
        ({"role": "user", "content": "x", "y": 1}, "messages[0].y", "not supported"),
        (
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
            "messages[0].content[0]",
            "'image_url'",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "data:x"}]},
            "messages[0].content[0].image_url",
            "must be an object such as",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "messages[0].content[0].image_url.url",
            "required",
        ),
        ({"role": "system", "content": [IMAGE]}, "messages[0].content[0].type", "'text'"),
        ({"role": "assistant", "content": [IMAGE]}, "messages[0].content[0]", "'refusal'"),
        (
            {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]},
            "messages[0].tool_calls",
            "not supported",
        ),
        (
            {"role": "assistant", "content": "x", "function_call": {"name": "f"}},
            "messages[0].function_call",
            "not supported",
        ),
        (
            {"role": "assistant", "content": "x", "audio": {"id": "a"}},
            "messages[0].audio",
            "not supported",
        ),
        ({"role": "user", "content": "x", "tool_calls": [{}]}, "messages[0].tool_calls", ""),
        ({"role": "user", "content": "x", "format": "png"}, "messages[0].format", ""),
    ],
)
def test_a_malformed_message_is_refused_at_its_place(message: Any, param: str, words: str) -> None:
    error = refusal_of({"model": "tiny", "messages": [message]})
    assert error.param == param
    assert words in str(error)


@pytest.mark.parametrize(
    "part",
    [
        b'"model": "\\ud800"',
        b'"model": "tiny", "stop": "\\uDFFF"',
        b'"\\ud800": 1',
        b'"model": "tiny", "messages": [{"role": "user", "content": "a\\ud800b"}]',
    ],
)
def test_half_a_surrogate_pair_is_refused_before_a_tokenizer_sees_it(part: bytes) -> None:
    """It became a 500: no UTF-8 encoder takes it, neither the tokenizer's nor the answer's."""
    assert refusal_of(b"{" + part + b"}").code == "invalid_json"


def test_a_whole_surrogate_pair_is_a_character() -> None:
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud83d\\ude00"}]}'
    message = parse_chat(body).messages[0]
    assert message.content is not None and message.content[0].model_dump()["text"] == "😀"


def test_a_refusal_never_repeats_what_was_sent() -> None:
    part = {"type": "image_url", "image_url": {"url": 5, "secret": "hunter2"}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": [part]}]}
    assert "hunter2" not in str(refusal_of(body))


def test_an_answer_of_ours_may_be_sent_back_as_the_clients_dump_it() -> None:
    answer = {
        "role": "assistant",
        "content": "Hello",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    body = chat_body()
    body["messages"] += [answer, {"role": "user", "content": "And?", "name": "me"}]
    assert len(parse_chat(json.dumps(body).encode()).messages) == 3


@pytest.mark.parametrize(
    "echoed",
    [
        {"role": "assistant", "content": "Hi", "provider_specific_fields": {"x": 1}},
        {"role": "assistant", "content": "Hi", "reasoning_content": "hm", "reasoning": {"a": 1}},
        {"role": "assistant", "content": "Hi", "annotations": [{"type": "url_citation"}]},
        {"role": "assistant", "content": "Hi", "refusal": None, "audio": None, "tool_calls": []},
        {"role": "assistant", "content": "Hi", "cache_control": {"type": "ephemeral"}},
        {"role": "assistant", "content": "Hi", "thinking_blocks": None},
        {"role": "system", "content": "Hi", "cache_control": {}, "tool_calls": None},
        {"role": "user", "content": "Hi", "tool_call_id": None},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}},
                {**IMAGE, "cache_control": None},
                {"type": "image_url", "image_url": {"url": "data:,", "format": "image/png"}},
            ],
        },
    ],
)
def test_what_clients_add_when_they_echo_a_conversation_is_ignored(echoed: dict[str, Any]) -> None:
    """A second turn from common clients was a 400: LiteLLM and others send back what they got,
    with fields of their own and nulls.
    """
    body = chat_body()
    body["messages"].append(echoed)
    (_, message) = parse_chat(json.dumps(body).encode()).messages
    assert message.model_dump(exclude_none=True).keys() == {"role", "content"}


@pytest.mark.parametrize("message", [{"content": None}, {"content": None, "tool_calls": []}, {}])
def test_an_assistant_message_without_content_is_an_empty_one(message: dict[str, Any]) -> None:
    """An empty answer comes back as null from some clients, and was a 400."""
    body = chat_body()
    body["messages"].append({"role": "assistant", **message})
    messages = engine_messages(parse_chat(json.dumps(body).encode()).messages)
    assert messages[1] == {"role": "assistant", "content": [{"type": "text", "text": ""}]}


def test_max_tokens_minus_one_is_none_at_all() -> None:
    """Local user interfaces send it for "unlimited", and got a 400."""
    assert parse_chat(json.dumps(chat_body(max_tokens=-1)).encode()).max_tokens is None


def test_a_tiny_repetition_penalty_is_refused() -> None:
    """Logits divided by it overflowed to NaN, and the whole request failed in the engine."""
    assert refusal_of(chat_body(repetition_penalty=1e-40)).param == "repetition_penalty"
    assert parse_chat(json.dumps(chat_body(repetition_penalty=0.01)).encode())


def test_deep_nesting_beside_an_escape_is_a_400_at_most() -> None:
    """The search for half surrogates recursed deeper than the parser: a RecursionError, so 500."""
    head = json.dumps(chat_body()).encode()[:-1]
    results = []
    for depth in range(50, 1050):  # the few where only the search fails depend on the stack
        inner = b"[" * depth + b'"\\ud83d\\ude00"' + b"]" * depth
        try:
            parse_chat(head + b', "metadata": {"a": ' + inner + b"}}")
            results.append("parsed")
        except InvalidRequestError as error:
            results.append(str(error))
    assert set(results) == {"parsed", "the body is nested too deeply"}
