"""The openai and anthropic SDKs through a proxy with Driftlock, as their users would call them.

Usage: sdks.py MODE UPSTREAM PROXY. MODE is `redact`, `block` or `hold` (block with headers held). Any
client error where none belongs, and any of Driftlock's doings that an SDK does not show in its own
exceptions and values, ends the program with a message and status 1.
"""

import sys

import anthropic
import openai

SECRETS = ("sk-proj-abcDEF0123456789", "joe@example.com")
# Messages that a stream learns from in this test.
WARM_UP = 80
ODD = "%%$#@! zzkq 0xdeadbeef ';--/* UNION SELECT \x7f vvqj xx || ~~ {{7*7}} ${jndi:ldap://x} " * 3


class OpenAi:
    blocked = openai.PermissionDeniedError
    broken = openai.APIError

    def __init__(self, base):
        self.client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=20)

    def ask(self, text, scenario=None):
        answer = self.client.chat.completions.create(**self.arguments(text, scenario))
        return answer.choices[0].message.content, answer.choices[0].finish_reason

    def stream(self, text, scenario=None):
        pieces = []
        with self.client.chat.completions.create(stream=True, **self.arguments(text, scenario)) as events:
            for event in events:
                if event.choices and event.choices[0].delta.content:
                    pieces.append(event.choices[0].delta.content)
        return "".join(pieces)

    def arguments(self, text, scenario):
        headers = {"x-test-scenario": scenario} if scenario else {}
        messages = [{"role": "user", "content": text}]
        return {"model": "gpt-4o", "messages": messages, "extra_headers": headers}

    stopped = "content_filter"


class Anthropic:
    blocked = anthropic.PermissionDeniedError
    broken = anthropic.APIError

    def __init__(self, base):
        self.client = anthropic.Anthropic(base_url=base, api_key="none", max_retries=0, timeout=20)

    def ask(self, text, scenario=None):
        answer = self.client.messages.create(**self.arguments(text, scenario))
        return "".join(block.text for block in answer.content), answer.stop_reason

    def stream(self, text, scenario=None):
        with self.client.messages.stream(**self.arguments(text, scenario)) as stream:
            return "".join(stream.text_stream)

    def arguments(self, text, scenario):
        headers = {"x-test-scenario": scenario} if scenario else {}
        messages = [{"role": "user", "content": text}]
        return {"model": "claude-sonnet-4-5", "max_tokens": 100, "messages": messages, "extra_headers": headers}

    stopped = "refusal"


def check(holds, what):
    if not holds:
        sys.exit(f"FAIL: {what}")


def raises(kind, call, what):
    try:
        result = call()
    except kind as error:
        return error
    except Exception as error:  # pylint: disable=broad-except
        sys.exit(f"FAIL: {what}: {type(error).__name__} instead of {kind.__name__}: {error}")
    sys.exit(f"FAIL: {what}: no {kind.__name__} but {result!r}")


def question(i):
    # Few texts, so that none is among the few per cent of normal ones that alpha lets be flagged.
    return f"Where is my order {1000 + i % 5 * 37} now?"


def unchanged(name, direct, proxied, rounds):
    for i in range(rounds):
        text = question(i)
        check(direct.ask(text) == proxied.ask(text), f"{name}: the answer differs")
        check(direct.stream(text) == proxied.stream(text), f"{name}: the streamed answer differs")


def redact(name, direct, proxied):
    unchanged(name, direct, proxied, 5)
    for how in ("ask", "stream"):
        plain = getattr(direct, how)("Where?", "leak")
        plain = plain[0] if how == "ask" else plain
        check(all(secret in plain for secret in SECRETS), f"{name}: the upstream does not leak: {plain}")
        seen = getattr(proxied, how)("Where?", "leak")
        seen = seen[0] if how == "ask" else seen
        check(not any(secret in seen for secret in SECRETS), f"{name} {how}: {seen}")
        check("[REDACTED:api_key]" in seen and "[REDACTED:email]" in seen, f"{name} {how}: {seen}")
        check(seen.startswith("Your order") and seen.endswith("knows it."), f"{name} {how}: {seen}")


def block(name, direct, proxied, held):
    for i in range(WARM_UP):
        proxied.ask(question(i))
        proxied.stream(question(i))
    unchanged(name, direct, proxied, 5)
    error = raises(proxied.blocked, lambda: proxied.ask(ODD), f"{name}: an odd request")
    check(error.status_code == 403 and "Driftlock" in str(error), f"{name}: {error}")
    raises(proxied.blocked, lambda: proxied.stream(ODD), f"{name}: an odd request for a stream")
    if held:
        raises(proxied.blocked, lambda: proxied.ask(question(1), "odd"), f"{name}: an odd answer")
    else:
        text, stopped = proxied.ask(question(1), "odd")
        check(stopped == proxied.stopped and not text, f"{name}: an odd answer: {stopped} {text!r}")
    error = raises(proxied.broken, lambda: proxied.stream(question(1), "odd"), f"{name}: an odd stream")
    check("Driftlock" in str(error), f"{name}: {error}")
    unchanged(name, direct, proxied, 2)


def main():
    mode, upstream, proxy = sys.argv[1:]
    for kind in (OpenAi, Anthropic):
        direct, proxied = kind(upstream), kind(proxy)
        if mode == "redact":
            redact(kind.__name__, direct, proxied)
        else:
            block(kind.__name__, direct, proxied, mode == "hold")
    print(f"{mode}: the SDKs see what they should")


if __name__ == "__main__":
    main()
