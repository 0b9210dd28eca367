"""A model by script: `scripted_server.py PORT FILE [MODE]`, answering as an OpenAI-compatible server.

FILE holds a list of answers, each a list with one text for every kind of question; the n-th request of
a kind gets the n-th answer. MODE: `cut` ends answers at the limit, `slow` takes a second for each,
`loading` is never ready, `broken` cannot load its model.
"""

import collections
import http.server
import json
import os
import sys
import time

PORT, MODE = int(sys.argv[1]), (sys.argv[3:] or ["good"])[0]
ANSWERS, SEEN = json.load(open(sys.argv[2])), collections.Counter()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, said = asked["messages"][-1]["content"], "yes"
        code = 200
        if self.headers["Authorization"] != "Bearer " + os.environ["MEGATRON_FP8_EVAL_KEY"]:
            code = 401
        elif MODE == "loading":
            code = 503
        elif text != "Say yes.":
            if MODE == "slow":
                time.sleep(1)
            kind = int("most" in text)
            said = ANSWERS[SEEN[kind] % len(ANSWERS)][kind].replace("{port}", str(PORT))
            said = f"<think>```python\nprint(0)\n```</think>```python\n{said}\n```"
            SEEN[kind] += 1
        stop = "length" if MODE == "cut" else "stop"
        message = {"role": "assistant", "content": said}
        body = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [{"index": 0, "finish_reason": stop, "message": message}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if MODE == "broken":
    sys.exit("ValueError: size mismatch for lm_head.weight")
http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
