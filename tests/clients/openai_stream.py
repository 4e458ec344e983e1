"""Asks for a streamed chat completion with the openai SDK; prints what came and when, as JSON."""

import json
import sys
import time

import openai

base_url, replay_id = sys.argv[1:]
client = openai.OpenAI(
    base_url=base_url + "/v1",
    api_key="none",
    max_retries=0,
    timeout=20,
    default_headers={"x-driftlock-replay-id": replay_id},
)
begun = time.monotonic()
text, times = "", []
stream = client.chat.completions.create(
    model="test", messages=[{"role": "user", "content": "Count to ten."}], stream=True
)
for chunk in stream:
    if chunk.choices and chunk.choices[0].delta.content:
        text += chunk.choices[0].delta.content
        times.append(time.monotonic() - begun)
print(json.dumps({"text": text, "times_s": times}))
