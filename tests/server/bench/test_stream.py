"""What the stamped bytes of a stream say."""

import json

from server.bench.stream import record


def event(text: str = "", **more: object) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}], **more}).encode()


END = b'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\ndata: [DONE]\n\n'


def test_the_first_text_not_the_first_byte_ends_the_wait() -> None:
    arrivals = [
        (0.1, b'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n'),
        (0.5, event("a") + b"\n\n"),
        (0.7, event("b") + b"\n\n"),
        (1.1, event("c") + b"\n\ndata: [DONE]\n\n"),
    ]
    result = record(arrivals)
    assert result.time_to_first_token_s == 0.5
    assert [round(gap, 6) for gap in result.gaps_s] == [0.2, 0.4]
    assert (result.tokens, result.counted_by, result.text) == (3, "chunks", "abc")
    assert result.e2e_s == 1.1
    assert round(result.inter_token_latency_s, 6) == 0.3


def test_an_event_cut_anywhere_counts_when_its_last_byte_came() -> None:
    whole = event("first") + b"\r\n\r\n" + event("second") + b"\r\n\r\n"
    for cut in range(1, len(whole)):
        result = record([(1.0, whole[:cut]), (2.0, whole[cut:])])
        assert result.text == "firstsecond"
        end_of_first = len(event("first")) + 4
        assert result.time_to_first_token_s == (1.0 if cut >= end_of_first else 2.0)


def test_tokens_are_those_of_the_usage_when_chunks_hold_several() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 5}
    arrivals = [
        (1.0, event("a b") + b"\n\n"),
        (3.0, event("c d e", usage=usage) + b"\n\n"),
    ]
    result = record(arrivals)
    assert (result.tokens, result.prompt_tokens, result.counted_by) == (5, 7, "usage")
    assert result.inter_token_latency_s == 0.5  # 2 s for the 4 tokens after the first


def test_an_error_within_the_stream_is_a_failure() -> None:
    broken = b'data: {"error": {"message": "engine failed"}}\n\n'
    assert "engine failed" in record([(1.0, event("a") + b"\n\n" + broken)]).error
    assert record([(1.0, END)]).error == "the stream held no text"


def test_a_stream_that_breaks_off_is_a_failure() -> None:
    arrivals = [(1.0, event("a") + b"\n\n")]
    broken = "the stream broke off: a choice has no finish_reason"
    assert record(arrivals).error == broken
    assert record([*arrivals, (1.5, END)]).error == ""
    second = b'data: {"choices": [{"index": 1, "delta": {"content": "b"}}]}\n\n'
    assert record([*arrivals, (1.2, second), (1.5, END)]).error == broken
    its_end = END.replace(b'"delta"', b'"index": 1, "delta"')
    assert record([*arrivals, (1.2, second), (1.5, END), (1.6, its_end)]).error == ""


def test_an_answer_whose_tokens_have_no_text_is_one_by_its_log_probabilities() -> None:
    token = {"choices": [{"delta": {"content": ""}, "logprobs": {"content": [{"token": ""}]}}]}
    arrivals = [(at, f"data: {json.dumps(token)}\n\n".encode()) for at in (1.0, 3.0)]
    result = record([*arrivals, (3.5, END)])
    assert (result.error, result.tokens, result.gaps_s) == ("", 2, (2.0,))


def test_unicode_line_separators_within_the_text_do_not_end_a_line() -> None:
    """splitlines() cut the JSON at them; some servers send them unescaped."""
    separators = "a\u2028b\u2029c\u0085d"
    chunk = {"choices": [{"delta": {"content": separators}}]}
    data = f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()
    assert record([(1.0, data)]).text == separators


def test_what_the_server_says_of_caches_and_steering_is_kept() -> None:
    usage = {"prompt_tokens": 600, "prompt_tokens_details": {"cached_tokens": 580}}
    steering = {"mode": "sample", "overhead_ms": 12.5, "shift_ms": 11.0}
    [last] = [event("b", usage=usage, steering=steering)]
    result = record([(1.0, event("a") + b"\n\n"), (2.0, last + b"\n\n")], start_s=40.0)
    assert (result.start_s, result.cached_tokens) == (40.0, 580)
    assert (result.overhead_ms, result.shift_ms) == (12.5, 11.0)
    silent = record([(1.0, event("a") + b"\n\n")])
    assert (silent.cached_tokens, silent.overhead_ms, silent.shift_ms) == (0, None, None)


def test_a_token_without_text_counts_when_its_log_probability_comes() -> None:
    """A gap between texts spans two tokens where the first of them has no text of its own."""
    silent = {"delta": {"content": ""}, "logprobs": {"content": [{"token": "x", "logprob": -1.0}]}}
    arrivals = [
        (1.0, event("a") + b"\n\n"),
        (1.5, b"data: " + json.dumps({"choices": [silent]}).encode() + b"\n\n"),
        (2.5, event("b") + b"\n\n"),
    ]
    result = record(arrivals)
    assert (result.gaps_s, result.text) == ((0.5, 1.0), "ab")


def test_every_revision_that_a_chunk_names_is_kept_once_and_a_chunk_without_one_is_seen() -> None:
    chunks = [event("a", steering_revision=7), event("b", steering_revision=7)]
    assert record([(1.0, b"\n\n".join([*chunks, b""]))]).revisions == (7,)
    chunks += [event("c", steering_revision=8), event("d"), event("e", steering_revision=7)]
    assert record([(1.0, b"\n\n".join([*chunks, b""]))]).revisions == (7, 8, None)
