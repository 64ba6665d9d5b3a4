"""What Prometheus reads."""

from __future__ import annotations

import pytest

from helpers.running import NAME, build, eventually, running


def test_counts_add_up():
    """Requests by outcome, tokens by depth, pages and times."""
    with running(build()) as made:
        before = made.metrics()
        assert before["recursify_up", ()] == 1
        assert before["recursify_pages", ()] == 256
        answer = made.client.completions.create(
            model=NAME,
            prompt="hello there",
            max_tokens=20,
            extra_body={"exit": {"policy": "confidence", "threshold": 0.1}},
        )
        made.http.post("/v1/completions", json={"prompt": [999]})
        depths = answer.choices[0].recursify["depths"]
        after = made.metrics()
        assert after["recursify_requests_total", ("completions", "answered")] == 1
        assert after["recursify_requests_total", ("completions", "invalid_value")] == 1
        assert {depth: depths.count(depth) for depth in set(depths)} == {
            int(labels[0]): value for (name, labels), value in after.items() if name == "recursify_exits_total"
        }
        assert after["recursify_generated_tokens_total", ()] == 20
        assert after["recursify_prompt_tokens_total", ()] == 11
        assert after["recursify_recursions_total", ()] == sum(depths) + 20
        assert after["recursify_time_to_first_token_seconds_count", ()] == 1
        assert after["recursify_request_seconds_count", ()] == 2
        assert after["recursify_pages_used", ()] == after["recursify_running_requests", ()] == 0


def test_what_is_there_now_is_shown():
    """Rows by depth, the queue and pages while answers are under way."""
    with running(build(max_num_seqs=2, seconds=0.02)) as made:
        body = {"model": NAME, "prompt": "hello", "max_tokens": 200, "stream": True, "n": 5}
        with made.client.completions.create(**body) as stream:
            next(iter(stream))
            found = made.metrics()
            assert found["recursify_running_requests", ()] == 2
            assert found["recursify_waiting_requests", ()] == 3
            assert found["recursify_pages_used", ()] > 0
            assert eventually(
                lambda: any(name == "recursify_rows" and value for (name, _), value in made.metrics().items())
            )
        assert eventually(lambda: made.metrics().get(("recursify_requests_total", ("completions", "abandoned"))) == 1)


def test_a_route_is_counted_by_its_endpoint(server):
    """Chats apart from completions."""
    before = server.metrics().get(("recursify_requests_total", ("chat", "answered")), 0)
    server.client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "x"}], max_tokens=2)
    assert server.metrics()["recursify_requests_total", ("chat", "answered")] == pytest.approx(before + 1)
