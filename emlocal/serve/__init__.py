"""An OpenAI-compatible server: asyncio talks to clients, and one thread owns the engine.

`protocol` reads requests, `shapes` and `responses` write answers, `app` joins the two. `guard` and `wire`
keep strangers and slow clients out. `engine_loop` answers, and `server` starts and ends everything.
"""
