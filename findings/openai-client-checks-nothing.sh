#!/usr/bin/env bash
# openai 3.57.0 (Python client): what a server answers with status 200 is taken as it is, a web page as a string.
#
# Guess: an error of the client where an answer is no chat completion.
# Seen: a page of HTML comes back as str, a JSON list as list, and {"error": ...} as a completion whose `choices` is
#     None; a text that is a number stays one. The first error is an AttributeError or TypeError in one's own code.
# latteflow: looks at the types itself; an answer that is none stops a run at once if it is the first, and names `url`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet openai==3.57.0
venv/bin/python -I - <<'EOF'
import httpx2
import openai


def asked(answer: httpx2.Response) -> object:
    transport = httpx2.MockTransport(lambda request: answer)
    client = openai.OpenAI(
        api_key="none", base_url="http://server.test/v1", max_retries=0, http_client=httpx2.Client(transport=transport)
    )
    return client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hello."}])


page = asked(httpx2.Response(200, html="<p>Welcome</p>"))
listed = asked(httpx2.Response(200, json=[1]))
failed = asked(httpx2.Response(200, json={"error": {"message": "busy"}}))
number = asked(httpx2.Response(200, json={"choices": [{"message": {"content": 17}}]}))
print(repr(page), repr(listed), type(failed).__name__, failed.choices, repr(number.choices[0].message.content))
assert page == "<p>Welcome</p>" and listed == [1]
assert type(failed).__name__ == "ChatCompletion" and failed.choices is None
assert number.choices[0].message.content == 17
EOF
