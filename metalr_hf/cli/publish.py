"""`metalr-hf publish`: a finished run goes to the Hub."""

from __future__ import annotations

import argparse

from ..hub.publish import publish


def main(argv: list[str]) -> int:
    """`metalr-hf publish`: uploads a finished run to the Hub.

    Args:
        argv (`list[str]`): The arguments.

    Returns:
        `int`: the exit code.
    """
    parser = argparse.ArgumentParser(prog="metalr-hf publish", description="Uploads a finished run to the Hub.")
    parser.add_argument("run", help="output folder of the run")
    parser.add_argument("--repo_id", required=True, help="user/name on the Hub; made if it is not there")
    parser.add_argument("--private", action="store_true", default=None, help="make it private")
    parser.add_argument("--revision", help="branch to commit to")
    parser.add_argument("--commit_message", default="Upload model", help="default: Upload model")
    given = parser.parse_args(argv)
    options = {"private": given.private, "revision": given.revision, "commit_message": given.commit_message}
    print(publish(given.run, given.repo_id, **options).repo_url)
    return 0
