"""Clients of an OpenAI-compatible server: `--connect URL` of `emlocal batch`."""
