"""Runs the commands and the code that come in on stdin, a JSON object a line, and answers what they said."""

import json
import os
import sys
import tempfile
import time
import traceback

# huggingface_hub tries again after seconds.
time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01))


def run(job):
    os.environ["HF_TOKEN"] = job["token"]
    if job.get("folder"):
        os.chdir(job["folder"])
    if "command" in job:
        from metalr_hf.cli import main

        return main(job["command"])
    exec(job["code"], {"argv": job["argv"], "__name__": "user"})
    return 0


def captured(job):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        # The file descriptors: loggers keep the streams that were there when they were made.
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            code = run(job)
        except SystemExit as exit:
            code = exit.code
        except BaseException:
            code = 1
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return {"returncode": code, "stdout": texts[0], "stderr": texts[1]}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(captured(json.loads(line))), file=answers, flush=True)
